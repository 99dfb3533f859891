// The documents of the server beside this page: those of `cloudckpt … --json`, each at api/NAME.

/** What went wrong, in a sentence. `kind` is the name of the error in Python. */
export class Problem extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** The document `name`, and its etag; without the document if it is still the one with `etag`. */
export async function get(name, query = {}, { etag = null, signal = null } = {}) {
  const url = new URL(`api/${name}`, document.baseURI);
  for (const [word, value] of Object.entries(query)) {
    if (value !== null && value !== undefined) url.searchParams.set(word, value);
  }
  let answer;
  try {
    answer = await fetch(url, { cache: "no-store", signal, headers: etag ? { "If-None-Match": etag } : {} });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(
      "Stopped",
      "cloudckpt ui does not answer: it was stopped. Start it again, and open the address that it prints.",
    );
  }
  if (answer.status === 304) return { document: null, etag };
  const body = await answer.text();
  let found;
  try {
    found = JSON.parse(body);
  } catch {
    throw new Problem("Refused", body.trim() || `the server answered ${answer.status}`);
  }
  if (!answer.ok) throw new Problem(found.kind, found.error);
  return { document: found, etag: answer.headers.get("ETag") };
}
