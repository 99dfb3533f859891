// "What would be deleted with keep_last=2?": the words are asked here, and decided by the package's own retention.

import { get } from "./api.js";
import { by, cells, element, keyed, text } from "./dom.js";
import { bytes, count, quoted } from "./format.js";

// How a query writes "without this rule", which for the newest and the best means all of them.
const NONE = "none";
const HOUR = 3600;
// Field -> the word of a query; word -> the option of the command line.
const WORDS = {
  "keep-last": "keep_last",
  "keep-best": "keep_best",
  "keep-every": "keep_every",
  "keep-within": "keep_within_s",
};
const OPTIONS = {
  keep_last: "--keep-last",
  keep_best: "--keep-best",
  keep_every: "--keep-every",
  keep_within_s: "--keep-within",
};

/** The form and its preview. `run` gives the name of the run that is shown; `fail` is told what goes wrong. */
export class Preview {
  constructor({ run, fail }) {
    this.run = run;
    this.fail = fail;
    // Only what somebody has moved is asked for; the rest is the stored policy's.
    this.words = {};
    this.listing = null;
    for (const id of Object.keys(WORDS)) {
      by(id).addEventListener("input", () => this.moved(id));
    }
    by("words").addEventListener("submit", (event) => event.preventDefault());
    by("words-reset").addEventListener("click", () => this.reset());
  }

  /** Back to the run's own settings. */
  reset() {
    this.words = {};
    if (this.listing) this.show(this.listing);
  }

  /** Another run is shown from now on: an answer about the one before comes too late. */
  forget() {
    this.asking?.abort();
    this.words = {};
    this.listing = null;
  }

  /** Show a document of `ls`, and what the words that are set would delete of it. */
  show(listing) {
    this.listing = listing;
    const { policy } = listing;
    const committed = listing.checkpoints.filter((checkpoint) => checkpoint.state === "committed").length;
    const best = policy.keep_best[0] ?? null;
    this.slide("keep-last", "keep_last", policy.keep_last, committed);
    this.slide("keep-best", "keep_best", best ? best.n : 0, committed);
    by("keep-best").disabled = best === null;
    const rules = policy.keep_best.map((rule) => `${rule.metric} (${rule.mode})`).join(", and so many by ");
    text(by("keep-best-why"), best === null ? "no metric is monitored in this run" : `by ${rules}`);
    this.number("keep-every", "keep_every", policy.keep_every);
    this.number("keep-within", "keep_within_s", policy.keep_within_s, HOUR);
    this.ask();
  }

  // A slider ends with "all", one past the largest number.
  slide(id, word, stored, committed) {
    const slider = by(id);
    const set = this.words[word];
    const wanted = set === undefined ? stored : set === NONE ? null : Number(set);
    const most = Math.max(committed, stored ?? 1, wanted ?? 1, 1);
    // A range takes no value beyond its end: the end goes first.
    slider.max = String(most + 1);
    slider.value = String(wanted ?? most + 1);
    this.say(id);
  }

  say(id) {
    const slider = by(id);
    const words = slider.value === slider.max ? "all" : slider.value;
    text(by(`${id}-is`), words);
    slider.setAttribute("aria-valuetext", words);
  }

  number(id, word, stored, unit = 1) {
    const field = by(id);
    if (word in this.words || document.activeElement === field) return;
    const shown = stored === null ? "" : String(stored / unit);
    if (field.value !== shown) field.value = shown;
  }

  moved(id) {
    const field = by(id);
    const word = WORDS[id];
    if (field.type === "range") {
      this.words[word] = field.value === field.max ? NONE : field.value;
      this.say(id);
    } else if (field.value === "" && !field.validity.badInput) {
      this.words[word] = NONE;
    } else if (field.checkValidity() && Number(field.value) > 0) {
      // "1e3" is a number here, and no integer there.
      this.words[word] = String(Number(field.value) * (word === "keep_within_s" ? HOUR : 1));
    } else {
      text(by("preview-sum"), id === "keep-every" ? "Steps are whole numbers from 1 on." : "Hours are numbers above 0.");
      return;
    }
    this.ask();
  }

  async ask() {
    this.asking?.abort();
    const mine = new AbortController();
    this.asking = mine;
    try {
      const { document: plan } = await get("prune", { run: this.run(), ...this.words }, { signal: mine.signal });
      if (!mine.signal.aborted) this.draw(plan);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  draw(plan) {
    const gone = plan.decisions.filter((decision) => !decision.keep);
    const kept = plan.decisions.length - gone.length;
    text(
      by("preview-sum"),
      gone.length
        ? `${count(gone.length, "checkpoint")} would be deleted (${bytes(plan.size_bytes)}), ${kept} kept.`
        : `Nothing would be deleted: ${kept} kept.`,
    );
    this.spell(plan.root);
    keyed(
      by("preview-rows"),
      [...plan.decisions].reverse(),
      (decision) => decision.checkpoint.name,
      () => element("tr"),
      (row, { checkpoint, keep, reasons }) =>
        cells(row, [
          { label: "Step", text: String(checkpoint.step) },
          { label: "Would be", text: keep ? "kept" : "deleted", kind: keep ? "stays" : "goes" },
          { label: "Size", text: bytes(checkpoint.size_bytes), kind: "number" },
          { label: "Because", text: reasons.join(", ") },
        ]),
    );
  }

  // The command that shows, and carries out, the same; it has no way to say "all" or "off".
  spell(root) {
    const said = Object.entries(this.words);
    const sayable = said.every(([, value]) => value !== NONE);
    by("preview-command").hidden = !sayable;
    const words = said.flatMap(([word, value]) => [OPTIONS[word], value]);
    text(by("preview-command").querySelector("code"), ["cloudckpt", "gc", quoted(root), ...words, "--dry-run"].join(" "));
  }
}
