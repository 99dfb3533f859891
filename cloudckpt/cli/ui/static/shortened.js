// Long tables: ten thousand rows take a browser seconds to lay out, at every change, and nobody reads them.

import { by, text } from "./dom.js";

const AT_ONCE = 500;

/**
 * Shortens a table until somebody asks for all of it. `id` names the paragraph that says so and holds the button,
 * `title` the heading above, which has the focus when the button is gone; `again` shows the table anew.
 */
export class Shortened {
  constructor(id, title, again) {
    this.place = by(id);
    this.all = false;
    this.place.querySelector("button").addEventListener("click", () => {
      this.all = true;
      again();
      by(title).focus();
    });
  }

  /** Those of the items that are shown: the first ones. */
  of(items) {
    const short = !this.all && items.length > AT_ONCE;
    this.place.hidden = !short;
    if (!short) return items;
    text(this.place.querySelector("span"), `The newest ${AT_ONCE} of ${items.length} are shown.`);
    return items.slice(0, AT_ONCE);
  }

  /** Another table is shown from now on. */
  forget() {
    this.all = false;
  }
}
