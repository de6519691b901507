// One answer: its text, token by token, and what it cost.

import { ask, Failure } from "./api.js";
import { ORIGINS, steps } from "./origins.js";

const SLOW = 2000; // milliseconds without a token after which the page says that it waits
const TALLEST = 16; // tokens of a step that fill the strip's height
const MOST_BARS = 160;

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const rounded = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

const FIGURES = [
  ["tpf", "tokens per forward", "The prompt's forward does not count, every later one does"],
  ["length", "acceptance length", "1 + accepted drafts per verified block"],
  ["speed", "tokens/s", "As they arrived here, without the wait for the first"],
  ["tokens", "tokens", "So far"],
];

const HEADINGS = {
  unreachable: "No server answers",
  refused: "The server refused this request",
  broken: "The answer broke off",
};

export class Answer {
  constructor(mode, label) {
    this.mode = mode;
    this.content = "";
    this.origins = [];
    this.figures = {};
    this.arrived = 0;
    this.status = element("span", { className: "status", textContent: "waits" });
    this.text = element("div", { className: "text" });
    this.notes = element("div", { className: "notes" });
    this.strip = element("div", { className: "strip", hidden: true });
    this.strip.setAttribute("role", "img");
    this.values = {};
    const list = (this.list = element("dl", { className: "figures" }));
    for (const [name, term, title] of FIGURES) {
      this.values[name] = element("dd", { textContent: "–" });
      list.append(element("div", { title }, this.values[name], element("dt", { textContent: term })));
    }
    this.node = element(
      "article",
      { className: "answer" },
      element("header", {}, element("h2", { textContent: label }), this.status),
      list,
      this.strip,
      this.text,
      this.notes,
    );
    this.node.setAttribute("aria-label", `Answer, ${label}`);
    this.node.dataset.mode = mode;
  }

  /** Ask, and show what comes. Resolves when the answer is over, however it ends. */
  async run(request, signal) {
    this.started = performance.now();
    this.setStatus("running", "waiting for the first token");
    const clock = setInterval(() => this.tick(), 250);
    try {
      await this.follow(request, signal);
      this.setStatus("done", this.finish === "length" ? "done, at the token limit" : "done");
    } catch (error) {
      if (error.name === "AbortError") this.setStatus("stopped", "stopped");
      else this.fail(error);
    } finally {
      clearInterval(clock);
      this.notes.querySelector(".slow")?.remove();
      this.draw();
    }
    return this;
  }

  async follow(request, signal) {
    try {
      for await (const chunk of ask(request, signal)) this.take(chunk);
    } catch (error) {
      const cannotTell = error instanceof Failure && error.kind === "refused" && /report=True/.test(error.message);
      if (!cannotTell) throw error;
      const { "nld.report": _, ...others } = request.vllm_xargs;
      this.note("This server cannot say how tokens come, so none is colored.");
      for await (const chunk of ask({ ...request, vllm_xargs: others }, signal)) this.take(chunk);
    }
  }

  take(chunk) {
    const choice = chunk.choices[0];
    if (chunk.usage) this.used = chunk.usage.completion_tokens;
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const delta = choice.delta ?? {};
    const thinks = (delta.reasoning ?? delta.reasoning_content) && !delta.content;
    this.content += delta.content ?? "";
    const tokens = chunk.nld?.tokens ?? [];
    if (chunk.nld) this.figures = chunk.nld;
    for (const { text, origin } of tokens) this.add(text, origin, thinks);
    if (!chunk.nld) this.add(delta.content ?? delta.reasoning ?? "", null, thinks);
    const count = this.count();
    if (count && this.first === undefined) {
      this.first = performance.now();
      this.before = count;
      this.setStatus("running", "writing");
    }
    if (count > this.arrived) this.last = performance.now();
    this.arrived = count;
    this.draw();
  }

  count() {
    return this.origins.length || this.used || 0;
  }

  add(text, origin, thinks) {
    if (origin) this.origins.push(origin);
    if (!text) return;
    const span = element("span", { textContent: text, className: `t ${origin ?? ""} ${thinks ? "thinks" : ""}` });
    if (origin) span.title = `${ORIGINS[origin].label}: ${ORIGINS[origin].help}`;
    this.text.append(span);
  }

  speed() {
    const seconds = (this.last - this.first) / 1000;
    return seconds > 0 ? (this.arrived - this.before) / seconds : null;
  }

  draw() {
    const { tokens_per_forward: tpf, acceptance_length: length } = this.figures;
    this.values.tpf.textContent = rounded(tpf, 2);
    this.values.length.textContent = rounded(length, 2);
    this.values.speed.textContent = rounded(this.speed(), 1);
    this.values.tokens.textContent = this.count() || "–";
    this.drawStrip();
    this.node.dispatchEvent(new Event("grew", { bubbles: true }));
  }

  drawStrip() {
    const all = steps(this.origins);
    const shown = all.slice(-MOST_BARS);
    this.strip.hidden = !all.length;
    this.strip.setAttribute(
      "aria-label",
      `${this.origins.length} tokens in ${all.length} steps, ${(this.origins.length / all.length || 0).toFixed(1)} a step`,
    );
    // Only the last bar of those already there may grow.
    while (this.strip.children.length > Math.max(0, shown.length)) this.strip.firstChild.remove();
    const from = all.length > MOST_BARS ? 0 : Math.max(0, this.strip.children.length - 1);
    shown.slice(from).forEach((origins, index) => {
      const bar = element("span", { className: "bar" });
      for (const origin of origins) {
        const part = element("i", { className: origin });
        part.style.height = `${100 / TALLEST}%`;
        bar.append(part);
      }
      const old = this.strip.children[from + index];
      if (old) old.replaceWith(bar);
      else this.strip.append(bar);
    });
  }

  tick() {
    if (this.first !== undefined) return;
    const waited = performance.now() - this.started;
    if (waited < SLOW) return;
    let slow = this.notes.querySelector(".slow");
    if (!slow) this.notes.append((slow = element("p", { className: "slow" })));
    slow.textContent = `No token yet, after ${Math.round(waited / 1000)} s. The server may be busy; Esc stops.`;
  }

  note(text) {
    this.notes.append(element("p", { textContent: text }));
  }

  fail(error) {
    const kind = error instanceof Failure ? error.kind : "broken";
    this.failed = true;
    this.list.hidden = !this.count();
    this.setStatus("failed", "failed");
    const box = element(
      "div",
      { className: `failure ${kind}` },
      element("strong", { textContent: HEADINGS[kind] }),
      element("p", { textContent: error.message }),
    );
    box.setAttribute("role", "alert");
    this.notes.append(box);
  }

  setStatus(state, words) {
    this.node.dataset.state = state;
    this.status.textContent = words;
  }

  /** What a screen reader is told at the end. */
  summary() {
    const { tokens_per_forward: tpf } = this.figures;
    return `${this.node.querySelector("h2").textContent}: ${this.status.textContent}, ${this.count()} tokens` +
      (tpf ? `, ${tpf.toFixed(2)} per forward` : "");
  }
}
