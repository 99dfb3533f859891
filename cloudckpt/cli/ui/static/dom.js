// Elements without a parser: whatever comes from a store goes in as text, and is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A new element. Children are nodes, or strings, which become text. */
export function element(name, attributes = {}, ...children) {
  return made(document.createElement(name), attributes, children);
}

/** A new element of a picture. */
export function svg(name, attributes = {}, ...children) {
  return made(document.createElementNS(SVG, name), attributes, children);
}

/** The element with this id. */
export function by(id) {
  return document.getElementById(id);
}

/** Give a node this text, if it has another one. What has not changed is not touched, so nothing flickers. */
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Give an element this attribute, if it has another one; null takes it away. */
export function attribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * Make the children of `parent` those of `items`, in their order. A child stays the same node as long as its key is
 * there, so that focus, selection and scrolling survive a refresh.
 */
export function keyed(parent, items, key, make, update) {
  const keys = items.map((item) => String(key(item)));
  const wanted = new Set(keys);
  const old = new Map();
  for (const child of [...parent.children]) {
    const name = child.dataset.key;
    if (wanted.has(name) && !old.has(name)) old.set(name, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  items.forEach((item, number) => {
    const name = keys[number];
    let child = old.get(name);
    old.delete(name);
    if (!child) {
      child = make(item);
      child.dataset.key = name;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  });
}

/**
 * Fill a row. Its first cell is its header. Each cell is {label, text}, or {label, fill} with a function that is given
 * the node inside; `kind` is its class.
 */
export function cells(row, columns) {
  attribute(row, "role", "row");
  keyed(
    row,
    columns.map((column, number) => ({ ...column, number })),
    (column) => `${column.number} ${column.label}`,
    (column) =>
      column.number === 0
        ? element("th", { role: "rowheader", scope: "row" }, element("span"))
        : element("td", { role: "cell" }, element("span")),
    (cell, column) => {
      attribute(cell, "data-label", column.label);
      attribute(cell, "class", column.kind ?? null);
      if (column.fill) column.fill(cell.firstElementChild);
      else text(cell.firstElementChild, column.text ?? "");
    },
  );
}
