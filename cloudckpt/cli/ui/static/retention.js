// "What would be deleted with keep_last=2?": the words are asked here, and decided by the package's own retention.

import { get } from "./api.js";
import { attribute, by, cells, element, keyed, text } from "./dom.js";
import { bytes, count, quoted } from "./format.js";
import { Shortened } from "./shortened.js";

// How a query writes "without this rule", which for the newest and the best means all of them.
const NONE = "none";
const HOUR = 3600;
// Field -> the word of a query.
const WORDS = {
  "keep-last": "keep_last",
  "keep-best": "keep_best",
  "keep-every": "keep_every",
  "keep-within": "keep_within_s",
};
// Field -> what to write there instead of what cannot be used.
const ADVICE = {
  "keep-every": "Keep every … steps: write a whole number from 1 on, or nothing.",
  "keep-within": "Keep … hours before the newest: write a number above 0, or nothing.",
};
// Word -> the option of the command line.
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
    this.wrong = new Set(); // the fields in which something stands that cannot be used
    this.listing = null;
    this.shown = null; // the plan that is shown, and the words that it is for
    this.turn = 0; // one more for each run
    this.asking = false;
    this.wanted = false;
    this.shortened = new Shortened("preview-more", "preview-title", () => this.draw());
    for (const id of Object.keys(WORDS)) {
      by(id).addEventListener("input", () => this.moved(id));
    }
    by("words").addEventListener("submit", (event) => event.preventDefault());
    by("words-reset").addEventListener("click", () => this.reset());
  }

  /** Back to the run's own settings. */
  reset() {
    this.clear();
    if (this.listing) this.show(this.listing);
  }

  /** Another run is shown from now on: an answer about the one before comes too late. */
  forget() {
    this.turn += 1;
    this.clear();
    Object.assign(this, { listing: null, shown: null, wanted: false });
    text(by("preview-sum"), "");
    by("preview-command").hidden = true;
    this.rows([]);
    this.shortened.forget();
  }

  clear() {
    this.words = {};
    for (const id of this.wrong) {
      by(id).value = "";
      attribute(by(id), "aria-invalid", null);
    }
    this.wrong.clear();
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
    if (word in this.words || this.wrong.has(id) || document.activeElement === field) return;
    const shown = stored === null ? "" : String(stored / unit);
    if (field.value !== shown) field.value = shown;
  }

  moved(id) {
    const field = by(id);
    const word = WORDS[id];
    this.wrong.delete(id);
    if (field.type === "range") {
      this.words[word] = field.value === field.max ? NONE : field.value;
      this.say(id);
    } else if (field.value === "" && !field.validity.badInput) {
      this.words[word] = NONE;
    } else if (field.checkValidity() && Number(field.value) > 0) {
      // "1e3" is a number here, and no integer there.
      this.words[word] = String(Number(field.value) * (word === "keep_within_s" ? HOUR : 1));
    } else {
      this.wrong.add(id);
    }
    attribute(field, "aria-invalid", this.wrong.has(id) ? "true" : null);
    this.ask();
  }

  // One question at a time, and then the newest: a slider that is dragged asks faster than a long run can be judged.
  async ask() {
    if (this.wrong.size) {
      this.refuse();
      return;
    }
    this.wanted = true;
    if (this.asking) return;
    this.asking = true;
    while (this.wanted) {
      this.wanted = false;
      await this.answer();
    }
    this.asking = false;
  }

  async answer() {
    const { turn } = this;
    const words = { ...this.words };
    try {
      const { document: plan } = await get("prune", { run: this.run(), ...words });
      if (turn !== this.turn || this.wrong.size) return;
      this.shown = { plan, words };
      this.draw();
    } catch (error) {
      if (turn === this.turn) this.fail(error);
    }
  }

  // No plan beside a setting that it is not for.
  refuse() {
    Object.assign(this, { shown: null, wanted: false });
    text(by("preview-sum"), [...this.wrong].map((id) => ADVICE[id]).join(" "));
    by("preview-command").hidden = true;
    this.rows([]);
  }

  draw() {
    if (!this.shown) return;
    const { plan, words } = this.shown;
    const gone = plan.decisions.filter((decision) => !decision.keep);
    const kept = plan.decisions.length - gone.length;
    text(
      by("preview-sum"),
      gone.length
        ? `${count(gone.length, "checkpoint")} would be deleted (${bytes(plan.size_bytes)}), ${kept} kept.`
        : `Nothing would be deleted: ${kept} kept.`,
    );
    this.spell(plan.root, words);
    this.rows([...plan.decisions].reverse());
  }

  rows(decisions) {
    by("preview-table").hidden = decisions.length === 0; // a head above nothing
    keyed(
      by("preview-rows"),
      this.shortened.of(decisions),
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
  spell(root, words) {
    const said = Object.entries(words);
    const sayable = said.every(([, value]) => value !== NONE);
    by("preview-command").hidden = !sayable;
    const options = said.flatMap(([word, value]) => [OPTIONS[word], value]);
    const command = ["cloudckpt", "gc", quoted(root), ...options, "--dry-run"];
    text(by("preview-command").querySelector("code"), command.join(" "));
  }
}
