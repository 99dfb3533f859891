// The runs below a prefix.

import { by, cells, element, keyed, text } from "./dom.js";
import { age, bytes, metric } from "./format.js";

/** Show a document of `ls PREFIX`. */
export function showRuns(found) {
  text(by("runs-as-of"), `As of ${new Date().toLocaleTimeString()}.`);
  keyed(
    by("runs-rows"),
    found.runs,
    (run) => run.name,
    () => element("tr"),
    (row, run) =>
      cells(row, [
        { label: "Run", fill: (inside) => link(inside, run) },
        { label: "Checkpoints", text: run.problem ? "" : String(run.checkpoints), kind: "number" },
        { label: "Size", text: run.problem ? "" : bytes(run.size_bytes), kind: "number" },
        { label: "Newest", text: run.latest ? `step ${run.latest.step}, ${age(run.latest.committed_at)}` : "" },
        { label: "Best", text: best(run) },
        { label: "State", text: state(run), kind: run.problem ? "goes" : null },
      ]),
  );
}

function link(inside, run) {
  if (!inside.firstElementChild) inside.append(element("a", { href: `#run=${encodeURIComponent(run.name)}` }));
  text(inside.firstElementChild, run.name);
}

function best(run) {
  if (!run.best) return "";
  return run.best_value === null ? `step ${run.best.step}` : `step ${run.best.step} (${run.metric}=${metric(run.best_value)})`;
}

function state(run) {
  if (run.problem) return run.problem;
  const words = run.uploading ? [`${run.uploading} uploading`] : [];
  return [...words, run.closed ? "closed" : "open"].join(", ");
}
