// The page: what is chosen, the conversation, and the answers to each message.

import { about, Failure, models, parseOptions } from "./api.js";
import { Answer, element } from "./answer.js";
import { ORIGINS } from "./origins.js";

const MODES = {
  auto: "Auto",
  ar: "AR",
  self_speculation: "Self-speculation",
  diffusion: "Diffusion",
};
const EXAMPLES = [
  "Write the Python function read.",
  "Write a Python class for a stack, with push and pop.",
  "Repeat this: the width of the box is the width of the lid plus the width of the hinge.",
];
const LOOK_AGAIN = 4000; // milliseconds between two looks for the server

const MARGIN = 12; // pixels between a message and the edge
const NEAR = 150; // pixels past the edge that still count as reading along

const byId = (id) => document.getElementById(id);
let history = [];
let model = null;
let url = "";
let running = null;

function fill() {
  for (const [value, textContent] of Object.entries(MODES)) byId("mode").append(element("option", { value, textContent }));
  byId("other").append(element("option", { value: "", textContent: "nothing" }));
  for (const [value, textContent] of Object.entries(MODES)) byId("other").append(element("option", { value, textContent }));
  byId("mode").value = "self_speculation";
  for (const text of EXAMPLES) {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => submit(text));
    byId("examples").append(element("li", {}, button));
  }
  for (const [name, { label, help }] of Object.entries(ORIGINS)) {
    if (name === "unknown" || name === "verified") continue;
    byId("legend").append(element("li", { title: help }, element("span", { className: `t ${name}`, textContent: label })));
  }
  showRace();
}

function showRace() {
  byId("race-label").hidden = !byId("other").value;
}

async function lookForServer() {
  try {
    url ||= (await about()).url;
    [model] = (await models()).map(({ id }) => id);
    const name = model.split("/").filter(Boolean).pop();
    showServer("up", `${name} at ${url}`);
  } catch (error) {
    model = null;
    showServer("down", error instanceof Failure ? error.message : String(error));
  }
}

function showServer(state, text) {
  byId("server").dataset.state = state;
  if (byId("server-text").textContent !== text) byId("server-text").textContent = text;
}

function requestFor(mode, messages) {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  return {
    model: model ?? "",
    messages,
    temperature: number("temperature") ?? 0,
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream_options: { include_usage: true, continuous_usage_stats: true },
    vllm_xargs: { "nld.mode": mode, "nld.report": 1, ...parseOptions(byId("options").value) },
  };
}

async function submit(text) {
  if (running || !text.trim()) return;
  const modes = [byId("mode").value, byId("other").value].filter(Boolean);
  const chat = history; // "New chat" begins another
  chat.push({ role: "user", content: text });
  const system = byId("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...chat];
  const answers = modes.map((mode) => new Answer(mode, MODES[mode]));
  showTurn(text, answers);
  byId("prompt").value = "";
  setRunning(new AbortController());
  const run = async (answer) => {
    try {
      await answer.run(requestFor(answer.mode, messages), running.signal);
    } catch (error) {
      answer.fail(error);
    }
  };
  if (!model) await lookForServer();
  if (byId("race").checked) await Promise.all(answers.map(run));
  else for (const answer of answers) await run(answer);
  finish(chat, answers);
}

function showTurn(text, answers) {
  byId("welcome").hidden = true;
  const pair = element("div", { className: answers.length > 1 ? "pair" : "single" }, ...answers.map(({ node }) => node));
  const turn = element("section", { className: "turn" }, element("p", { className: "question", textContent: text }), pair);
  turn.setAttribute("aria-label", `Message: ${text.slice(0, 60)}`);
  byId("log").append(turn);
  byId("main").scrollTop += turn.getBoundingClientRect().top - byId("main").getBoundingClientRect().top - MARGIN;
}

/** Follow an answer that grows past the lower edge, unless somebody has scrolled up to read. */
function follow(event) {
  const over = event.target.getBoundingClientRect().bottom - byId("main").getBoundingClientRect().bottom;
  if (over > 0 && over < NEAR) byId("main").scrollTop += over + MARGIN;
}

function finish(chat, answers) {
  const [first, second] = answers;
  setRunning(null);
  if (first.content) chat.push({ role: "assistant", content: first.content });
  else chat.pop(); // nothing was said to this message
  if (second && !first.failed && !second.failed) compare(first, second);
  byId("announce").textContent = answers.map((answer) => answer.summary()).join(". ");
  byId("prompt").focus();
  if (answers.some(({ failed }) => failed)) lookForServer();
}

function compare(first, second) {
  const same = first.content === second.content;
  const speeds = [first.speed(), second.speed()];
  const faster = speeds[0] && speeds[1] ? ` The left one was ${(speeds[0] / speeds[1]).toFixed(2)} times as fast.` : "";
  const text = `${same ? "Both texts are the same." : "The texts differ."}${faster} The chat goes on from the left one.`;
  first.node.parentElement.after(element("p", { className: "verdict", textContent: text }));
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  document.body.dataset.running = Boolean(controller);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(byId("prompt").value);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit(byId("prompt").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("log").addEventListener("grew", follow);
byId("other").addEventListener("change", showRace);
byId("new").addEventListener("click", () => {
  running?.abort();
  history = [];
  byId("log").replaceChildren();
  byId("welcome").hidden = false;
  byId("prompt").focus();
});

fill();
lookForServer();
setInterval(() => model ?? lookForServer(), LOOK_AGAIN);
byId("prompt").focus();
