// Annotations of a study and of all in it: files that somebody linked, and DICOM objects that refer to it.

import { ask, download } from "./api.js";
import { bytes, h, table, when } from "./dom.js";

const PAGE = 200;
const DICOM = "application/dicom";
const COLUMNS = [
  ["Name", (row) => row.name ?? row.id],
  ["Type", (row) => row.type],
  ["Author", (row) => row.author],
  ["When", (row) => (row.at ? when(row.at) : "")],
  ["Of", (row) => row.level],
  ["Size", (row) => bytes(row.size), "number"],
  ["File", (row) => h("button", { type: "button", click: () => save(row) }, "Download")],
];

function save(row) {
  if (row.media_type !== DICOM || row.name) return download(row.href, row.name, "*/*");
  return download(`${row.href}?accept=${DICOM}`, `${row.id}.dcm`, DICOM);
}

// Filled when the list has come: the study does not wait for it.
export function annotations(uid) {
  const place = h("section", { "aria-label": "Annotations" });
  fill(place, uid).catch((error) => {
    place.replaceChildren(h("h2", {}, "Annotations"), h("p", { class: "error", role: "alert" }, error.message));
  });
  return place;
}

async function fill(place, uid) {
  const [rows, heading, list] = [[], h("h2"), h("div")];
  const more = h("button", { type: "button", click: () => add() }, "Show more");
  const add = async () => {
    const response = await ask(`/annotations?uid=${uid}&limit=${PAGE}&offset=${rows.length}`);
    rows.push(...await response.json());
    const total = Number(response.headers.get("x-total-count"));
    heading.textContent = total === 1 ? "1 annotation" : `${total} annotations`;
    list.replaceChildren(rows.length ? table(COLUMNS, rows) : "");
    more.hidden = rows.length >= total;
  };
  await add();
  place.replaceChildren(heading, list, more);
}
