// How a token came, in the words of the server's report, and of this page.

export const ORIGINS = {
  ar: { label: "plain AR", help: "one forward, one token" },
  drafted: { label: "drafted", help: "drafted by the model in a block, and accepted" },
  looked_up: { label: "looked up", help: "found earlier in the text or the prompt, and accepted" },
  corrected: { label: "corrected", help: "the verifier's token where it rejected a draft" },
  bonus: { label: "bonus", help: "the verifier's token after a block of accepted drafts" },
  verified: { label: "verifier's", help: "the verifier's token: a correction or a bonus" },
  denoised: { label: "denoised", help: "decided by a denoising forward of diffusion" },
  seed: { label: "block's first", help: "the first token of a diffusion block, from the causal forward" },
  unknown: { label: "not told", help: "the server did not say how it came" },
};

/** Origins of tokens that need another one after them in the same step: all others end a step. */
const INSIDE = new Set(["drafted", "looked_up", "denoised"]);

/** Cut a text's origins into the steps that gave them: lists of origins, one per step. */
export function steps(origins) {
  const found = [];
  let open = null;
  for (const origin of origins) {
    if (open === null) found.push((open = []));
    open.push(origin);
    if (!INSIDE.has(origin)) open = null;
  }
  return found;
}
