// A header as a table: tags, names and values, found as one types.

import { plain } from "./api.js";
import { h } from "./dom.js";

const LONG = 400; // characters of a value

export function headerTable(header, names) {
  const rows = [...flat(header, names, 0)];
  const body = h("tbody", {}, rows.map(({ row }) => row));
  const count = h("p", { class: "note", role: "status" }, `${rows.length} elements`);
  const find = (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, searched } of rows) {
      row.hidden = !words.every((word) => searched.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} elements`;
  };
  const box = h("input", { type: "search", "aria-label": "Search the header", placeholder: "tag, name or value", input: find });
  return h("section", {}, box, count, h("table", { class: "header" }, body));
}

function* flat(item, names, depth) {
  for (const tag of Object.keys(item).sort()) {
    const { vr, Value: values = [], BulkDataURI: bulk, InlineBinary: inline } = item[tag];
    const name = names[tag] ?? (parseInt(tag.slice(3, 4), 16) % 2 ? "(private)" : "");
    const text = vr === "SQ" ? `${values.length} items` : bulk ? "(bulk data)" : inline ? "(binary)" : values.map(plain).join(" \\ ");
    yield line(tag, vr, name, text, depth);
    if (vr !== "SQ") continue;
    for (const inner of values) yield* flat(inner ?? {}, names, depth + 1);
  }
}

function line(tag, vr, name, text, depth) {
  const shown = text.length > LONG ? `${text.slice(0, LONG)} …` : text;
  const place = `(${tag.slice(0, 4)},${tag.slice(4)})`;
  const row = h("tr", {}, h("td", { class: `depth${Math.min(depth, 4)}` }, place), h("td", {}, vr ?? ""), h("td", {}, name), h("td", {}, shown));
  return { row, searched: `${place} ${tag} ${name} ${text}`.toLowerCase() };
}
