// The documents of the server beside this page: those of `cloudckpt … --json`, each at api/NAME.

// The server says after seconds that a store does not answer; who is silent for longer is not there any more: a
// connection that is forwarded (ssh -L) can be gone without a word.
const PATIENCE_MS = 120_000;

/** What went wrong, in a sentence. `kind` is the name of the error in Python. */
export class Problem extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/**
 * The document `name`, and its etag; without the document if it is still the one with `etag`. `patience` is how many
 * milliseconds it may take, null for as long as it takes.
 */
export async function get(name, query = {}, { etag = null, patience = PATIENCE_MS } = {}) {
  const url = new URL(`api/${name}`, document.baseURI);
  for (const [word, value] of Object.entries(query)) {
    if (value !== null && value !== undefined) url.searchParams.set(word, value);
  }
  const signal = patience === null ? null : AbortSignal.timeout(patience);
  let answer;
  let body;
  try {
    answer = await fetch(url, { cache: "no-store", signal, headers: etag ? { "If-None-Match": etag } : {} });
    if (answer.status === 304) return { document: null, etag };
    body = await answer.text(); // which ends early with a server that is stopped in the middle of it
  } catch (error) {
    if (error.name === "TimeoutError") throw new Problem("Silent", "cloudckpt ui has not answered for two minutes.");
    throw new Problem(
      "Stopped",
      "cloudckpt ui does not answer: it was stopped. Start it again, and open the address that it prints.",
    );
  }
  let found;
  try {
    found = JSON.parse(body);
  } catch {
    throw new Problem("Refused", body.trim() || `the server answered ${answer.status}`);
  }
  if (!answer.ok) throw new Problem(found.kind, found.error);
  return { document: found, etag: answer.headers.get("ETag") };
}
