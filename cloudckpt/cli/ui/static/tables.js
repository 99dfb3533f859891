// What is known of one run besides its chart: the facts, the uploads, the checkpoints, the journal.

import { attribute, by, cells, element, keyed, text } from "./dom.js";
import { bytes, count, metric, showTime } from "./format.js";

/** Show a document of `ls`: all of it but the chart and the preview. `shorten` gives those of many rows that are shown. */
export function showListing(listing, { retired, picked, shorten }) {
  const metrics = [...new Set(listing.checkpoints.flatMap((checkpoint) => Object.keys(checkpoint.metrics)))].sort();
  showFacts(listing);
  showUploads(listing);
  showHead(metrics);
  const shown = listing.checkpoints.filter((checkpoint) => retired || checkpoint.state !== "retired");
  by("table").hidden = shown.length === 0; // a head above nothing
  keyed(
    by("table-rows"),
    shorten(shown.sort((one, other) => other.seq - one.seq)),
    (checkpoint) => checkpoint.name,
    () => element("tr"),
    (row, checkpoint) => showRow(row, checkpoint, metrics, listing, picked),
  );
}

/** Mark the row of the checkpoint that is looked at in the chart. */
export function pickRow(name) {
  for (const row of by("table-rows").children) {
    const mine = row.dataset.key === name;
    row.classList.toggle("picked-row", mine);
    attribute(row, "aria-current", mine ? "true" : null);
  }
}

/** Say anew how long ago everything was. */
export function tick() {
  for (const node of document.querySelectorAll("time")) showTime(node, node.dateTime);
}

function showFacts(listing) {
  const committed = listing.checkpoints.filter((checkpoint) => checkpoint.state === "committed");
  const size = committed.reduce((sum, checkpoint) => sum + checkpoint.size_bytes, 0);
  const named = (id) => committed.find((checkpoint) => checkpoint.id === id);
  const usable = committed.filter((checkpoint) => checkpoint.damaged === null && !checkpoint.marks.length);
  const newest = usable.sort((one, other) => other.seq - one.seq)[0];
  const facts = [
    ["kept", `${count(committed.length, "checkpoint")}, ${bytes(size)}`],
    ["newest", newest ? `step ${newest.step}` : "none yet"],
    ...listing.best.map(({ metric: name, mode, ids }) => {
      const found = ids.length ? named(ids[0]) : undefined;
      const value = found && (measured(found, name) ?? measured(found, `eval_${name}`));
      return [`best by ${name}`, found ? `step ${found.step}: ${metric(value)} (${mode})` : "none yet"];
    }),
    ["settings", settings(listing.policy)],
    ["revision", String(listing.revision)],
  ];
  keyed(
    by("facts"),
    facts.flatMap(([name, value]) => [
      { name, kind: "dt", value: name },
      { name, kind: "dd", value },
    ]),
    (fact) => `${fact.kind} ${fact.name}`,
    (fact) => element(fact.kind),
    (node, fact) => text(node, fact.value),
  );
}

// Its own alone: a metric may be called "constructor", which every object has.
function measured(checkpoint, name) {
  return Object.hasOwn(checkpoint.metrics, name) ? checkpoint.metrics[name] : undefined;
}

function settings(policy) {
  const words = [policy.keep_last === null ? "keep all" : `last ${policy.keep_last}`];
  words.push(...policy.keep_best.map((rule) => `best ${rule.n ?? "all"} by ${rule.metric} (${rule.mode})`));
  if (policy.keep_every !== null) words.push(`every ${policy.keep_every} steps`);
  if (policy.keep_within_s !== null) words.push(`within ${policy.keep_within_s} s of the newest`);
  return words.join(", ");
}

function showUploads(listing) {
  const pending = listing.checkpoints.filter((checkpoint) => checkpoint.state === "pending");
  by("uploads").hidden = pending.length === 0;
  keyed(
    by("uploads-list"),
    pending,
    (checkpoint) => checkpoint.name,
    () => element("li", {}, element("span"), element("progress"), element("span")),
    (item, checkpoint) => {
      const [name, bar, words] = item.children;
      const arrived = listing.uploaded_bytes[checkpoint.id];
      text(name, checkpoint.name);
      attribute(bar, "aria-label", `upload of ${checkpoint.name}`);
      const known = arrived !== undefined && checkpoint.size_bytes > 0;
      // Without a value the bar says that nobody knows how far it is.
      attribute(bar, "max", known ? checkpoint.size_bytes : null);
      attribute(bar, "value", known ? Math.min(arrived, checkpoint.size_bytes) : null);
      text(words, known ? `${share(arrived, checkpoint)} % of ${bytes(checkpoint.size_bytes)}` : "how far is not known");
    },
  );
}

// Not whole before it is committed.
function share(arrived, checkpoint) {
  return Math.min(99, Math.floor((100 * arrived) / checkpoint.size_bytes));
}

function showHead(metrics) {
  const columns = ["Step", "Age", "Size", ...metrics, "Kept because", "State"];
  keyed(
    by("table-head"),
    columns.map((name, number) => ({ name, number: number === 2 || (number > 2 && number < 3 + metrics.length) })),
    (column) => `${column.number} ${column.name}`,
    () => element("th", { role: "columnheader", scope: "col" }),
    (cell, column) => {
      attribute(cell, "class", column.number ? "number" : null);
      text(cell, column.name);
    },
  );
}

function showRow(row, checkpoint, metrics, listing, picked) {
  row.className = [checkpoint.state, checkpoint.name === picked ? "picked-row" : ""].join(" ").trim();
  cells(row, [
    { label: "Step", text: String(checkpoint.step) },
    { label: "Age", fill: (inside) => showAge(inside, checkpoint.committed_at ?? checkpoint.announced_at) },
    { label: "Size", text: bytes(checkpoint.size_bytes), kind: "number" },
    ...metrics.map((name) => ({ label: name, text: metric(measured(checkpoint, name)), kind: "number" })),
    { label: "Kept because", text: because(checkpoint) },
    { label: "State", text: state(checkpoint, listing.uploaded_bytes[checkpoint.id]) },
  ]);
}

function showAge(inside, at) {
  if (!inside.firstElementChild) inside.append(element("time"));
  showTime(inside.firstElementChild, at);
}

function because(checkpoint) {
  if (checkpoint.state === "committed") return checkpoint.kept_because.join(", ");
  return checkpoint.state === "retired" ? ["not kept", checkpoint.retired_because].filter(Boolean).join(": ") : "";
}

function state(checkpoint, arrived) {
  const known = arrived !== undefined && checkpoint.size_bytes > 0;
  const words = [checkpoint.state];
  if (checkpoint.state === "pending") words[0] = known ? `uploading ${share(arrived, checkpoint)} %` : "uploading";
  if (checkpoint.damaged !== null) words.push(`damaged: ${checkpoint.damaged}`);
  words.push(...checkpoint.marks.map((mark) => `marked ${mark}`), ...checkpoint.tags.map((tag) => `tag:${tag}`));
  return words.join(", ");
}

/** Show a document of `log`. */
export function showJournal(log) {
  // Some events of one write are alike but for their place: the number, counted from the oldest, tells them apart.
  const seen = new Map();
  const events = log.events.map((event) => {
    const name = [event.revision, event.event, event.id, event.at].join(" ");
    seen.set(name, (seen.get(name) ?? 0) + 1);
    return { ...event, key: `${name} ${seen.get(name)}` };
  });
  keyed(
    by("journal"),
    events.reverse(),
    (event) => event.key,
    () => element("li", {}, element("time"), element("strong"), element("span")),
    (item, event) => {
      const [time, name, words] = item.children;
      showTime(time, event.at);
      text(name, event.event);
      const about = event.id ? `checkpoint-${event.step}.${event.id}` : "";
      text(words, [about, event.detail].filter(Boolean).join(": "));
    },
  );
}
