// Talks to the server, through the small one that serves this page.

/** What went wrong, in one word and in the server's words. */
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind; // "unreachable", "refused" or "broken"
  }
}

function kindOf(status) {
  if ([502, 503, 504].includes(status)) return "unreachable";
  return status >= 400 && status < 500 ? "refused" : "broken";
}

async function failureOf(response) {
  let message = response.statusText;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  return new Failure(kindOf(response.status), message);
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("unreachable", "vllm-nld chat, which serves this page, does not answer. Start it again.");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

export async function about() {
  return (await call("/about")).json();
}

export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

/** Yield the chunks of a streamed answer. */
export async function* ask(request, signal) {
  const body = JSON.stringify({ ...request, stream: true });
  const headers = { "Content-Type": "application/json" };
  const response = await call("/v1/chat/completions", { method: "POST", headers, body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("broken", "The connection broke in the middle of the answer.");
    }
    const lines = (rest + (part.value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Failure(kindOf(chunk.error.code), chunk.error.message); // after vLLM has begun
      yield chunk;
    }
    if (part.done) throw new Failure("broken", "The server went away in the middle of the answer.");
  }
}

/** Read "threshold=0.8 sampler=top_k" as the request's own options. */
export function parseOptions(text) {
  const found = {};
  for (const word of text.split(/[\s,]+/).filter(Boolean)) {
    const at = word.indexOf("=");
    if (at < 1) throw new Failure("refused", `“${word}” is no option: write key=value, such as threshold=0.8`);
    const value = word.slice(at + 1);
    const number = { true: 1, false: 0 }[value] ?? Number(value);
    found[`nld.${word.slice(0, at).replace(/^nld\./, "")}`] = value === "" || Number.isNaN(number) ? value : number;
  }
  return found;
}
