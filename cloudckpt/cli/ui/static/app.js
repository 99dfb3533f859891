// The page: which run is shown, when it is looked at again, and what is said when that fails.

import { Problem, get } from "./api.js";
import { Chart } from "./chart.js";
import { attribute, by, element, keyed, text } from "./dom.js";
import { Preview } from "./retention.js";
import { showRuns } from "./runs.js";
import { Shortened } from "./shortened.js";
import { pickRow, showJournal, showListing, tick } from "./tables.js";

const RUN = "#run=";
const THEME = "cloudckpt-theme";
const NOT_FOUND = "CheckpointNotFoundError";
// A store in trouble is asked ever more rarely, down to once in so many seconds.
const RAREST_S = 60;

const state = {
  known: false, // whether it is known what the page was opened for
  several: false, // whether that is a prefix with runs below it
  run: null, // the name of the run that is shown: "" for the root itself, null while there is none
  listing: null, // the last document of `ls`
  etag: null,
  metric: null, // null for the run's own choice
  turn: 0, // one more for each run that is shown: answers about another one come too late
  looking: false,
  failures: 0, // how many looks in a row were in vain
  again: false, // somebody asked for a look while one was under way
  timer: null,
};

const chart = new Chart((name) => pickRow(name));
const preview = new Preview({ run: () => state.run, fail: complain });
const shortened = new Shortened("table-more", "table-title", () => showTable());

// -- what is said when something fails ------------------------------------------------------------------------

function complain(error) {
  if (!(error instanceof Problem)) console.error(error);
  const again = every() ? "It is tried again by itself." : "“Refresh now” tries again.";
  text(by("problem"), error.kind === "Stopped" ? error.message : `${error.message}\n${again}`);
  by("problem").hidden = false;
}

function fine() {
  by("problem").hidden = true;
  text(by("problem"), "");
  text(by("as-of"), `As of ${new Date().toLocaleTimeString()}.`);
}

// -- one run --------------------------------------------------------------------------------------------------

async function look() {
  const turn = state.turn;
  const { document: listing, etag } = await get("ls", { run: state.run }, { etag: state.etag });
  if (turn !== state.turn) return;
  if (listing !== null) {
    state.listing = listing;
    // These are made of the same look, and cost the store nothing.
    const [log] = await Promise.all([get("log", { run: state.run }), showPlot(turn)]);
    if (turn !== state.turn) return;
    showAll(log.document);
    // Only now: a look that could not be shown must be had again.
    state.etag = etag;
  }
  tick();
  fine();
}

function showAll(log) {
  text(by("run-title"), state.listing.root);
  by("run").hidden = false;
  showTable();
  showJournal(log);
  preview.show(state.listing);
}

function showTable() {
  showListing(state.listing, {
    retired: by("retired").checked,
    picked: chart.picked,
    shorten: (rows) => shortened.of(rows),
  });
  pickRow(chart.picked);
}

async function showPlot(turn) {
  const { policy, checkpoints } = state.listing;
  const names = [...new Set(checkpoints.flatMap((checkpoint) => Object.keys(checkpoint.metrics)))].sort();
  const monitored = policy.keep_best.map((rule) => rule.metric);
  const metrics = [...new Set([...monitored, ...names])];
  if (!metrics.includes(state.metric)) state.metric = null;
  const reported = (name) => names.includes(name) || names.includes(`eval_${name}`);
  const chosen = state.metric ?? metrics.find(reported) ?? null;
  const options = by("metric");
  keyed(options, metrics, (name) => name, (name) => element("option", { value: name }), (option, name) => text(option, name));
  if (chosen !== null) options.value = chosen;
  // Answers can overtake each other: one about another metric than the one that is chosen by now comes too late.
  const late = () => turn !== state.turn || (chosen !== null && options.value !== chosen);
  try {
    if (chosen === null) throw new Problem(NOT_FOUND, "No checkpoint has a metric yet: give save() metrics={…}.");
    const { document: plot } = await get("plot", { run: state.run, metric: chosen });
    if (late()) return;
    by("chart-body").hidden = false;
    by("chart-none").hidden = true;
    text(by("chart-title"), `${plot.metric} over steps`);
    chart.show(plot);
  } catch (error) {
    // A run whose metric nobody has reported yet is no failure of the page.
    if (error.kind !== NOT_FOUND) throw error;
    if (late()) return;
    chart.show(null);
    text(by("chart-title"), `${chosen ?? "Metric"} over steps`);
    by("chart-body").hidden = metrics.length < 2;
    by("chart-none").hidden = false;
    text(by("chart-none"), error.message);
  }
}

// -- which run ------------------------------------------------------------------------------------------------

async function list() {
  // All that is below the prefix is listed there, which may take its time.
  const { document: found } = await get("runs", {}, { patience: null });
  state.known = true;
  state.several = found.runs.length > 0;
  text(by("place"), found.root);
  showRuns(found);
}

/** The name of the run that the address asks for; "" for none. */
function named() {
  if (!location.hash.startsWith(RUN)) return "";
  try {
    return decodeURIComponent(location.hash.slice(RUN.length));
  } catch {
    return ""; // half of an escape, written by hand
  }
}

/** Show the run that the address asks for from now on, or the list; whether that is another one than before. */
function route() {
  const name = named();
  const run = state.several ? name || null : "";
  by("runs").hidden = run !== null;
  by("back").hidden = !state.several || run === null;
  if (run === state.run && state.turn > 0) return false;
  state.turn += 1;
  Object.assign(state, { run, listing: null, etag: null, metric: null });
  by("run").hidden = true;
  by("problem").hidden = true; // was another one's
  shortened.forget();
  preview.forget();
  chart.pick(null);
  document.title = run ? `${run} - cloudckpt` : "cloudckpt";
  return true;
}

// -- when -----------------------------------------------------------------------------------------------------

function every() {
  return Number(by("every").value);
}

/** Look once, and set the clock for the next time. */
async function refresh() {
  clearTimeout(state.timer);
  if (state.looking) {
    state.again = true;
    return;
  }
  Object.assign(state, { looking: true, again: false });
  let { turn } = state;
  try {
    if (!state.known) {
      await list();
      route();
      if (state.run === null) fine();
    }
    turn = state.turn;
    if (state.run !== null) await look();
    state.failures = 0;
  } catch (error) {
    if (turn === state.turn) failed(error); // and not about a run that somebody has left meanwhile
  } finally {
    state.looking = false;
  }
  if (state.again || turn !== state.turn) refresh();
  else schedule();
}

function failed(error) {
  // Where there is nothing yet, a run may begin, or several below it.
  if (error.kind === NOT_FOUND && state.listing === null && !state.several) state.known = false;
  else state.failures += 1;
  complain(error);
}

function schedule() {
  clearTimeout(state.timer);
  const pause = Math.max(every(), Math.min(every() * 2 ** state.failures, RAREST_S));
  // Nobody looks at a hidden page: it asks the store for nothing.
  if (pause > 0 && !document.hidden) state.timer = setTimeout(refresh, pause * 1000);
}

/** What somebody wants who does not wait: another look, and where the runs are shown, another list. */
function now() {
  state.failures = 0;
  if (state.known && state.run === null) listAgain();
  else refresh();
}

async function listAgain() {
  try {
    await list();
    if (route()) refresh();
    else if (state.run === null) fine();
  } catch (error) {
    if (state.run !== null) return; // somebody has gone on to one of them
    state.known = false; // so that it is tried again by itself
    complain(error);
  }
}

// -- colours --------------------------------------------------------------------------------------------------

function colours(theme) {
  attribute(document.documentElement, "data-theme", theme || null);
  by("theme").value = theme;
}

function remembered() {
  try {
    return localStorage.getItem(THEME) ?? "";
  } catch {
    return ""; // a browser that remembers nothing for pages
  }
}

function remember(theme) {
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // The same: the choice holds until the page is closed.
  }
}

by("now").addEventListener("click", now);
by("runs-again").addEventListener("click", now);
by("every").addEventListener("change", schedule);
by("retired").addEventListener("change", () => state.listing && showTable());
by("metric").addEventListener("change", () => {
  state.metric = by("metric").value;
  showPlot(state.turn).catch(complain);
});
by("theme").addEventListener("change", () => {
  remember(by("theme").value);
  colours(by("theme").value);
});
// By its address the page would forget which run it shows.
by("skip").addEventListener("click", (event) => {
  event.preventDefault();
  by("main").focus();
});
window.addEventListener("hashchange", () => {
  // The link that was followed is gone with what was shown before: whoever uses the keyboard goes on from here.
  if (state.turn > 0 && route()) by("main").focus();
  refresh();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(state.timer) : refresh()));

colours(remembered());
refresh();
