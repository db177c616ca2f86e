// The list of studies: filters ask as they are typed, and stay in the address.

import { ROOT, date, search, text } from "./api.js";
import { h, line, show, table } from "./dom.js";

const PAGE = 100;
const PAUSE_MS = 120;
const FIELDS = [
  ["PatientName", "Patient name", "search"],
  ["PatientID", "Patient ID", "search"],
  ["from", "From", "date"],
  ["to", "To", "date"],
  ["ModalitiesInStudy", "Modality", "search"],
  ["StudyDescription", "Description", "search"],
  ["AccessionNumber", "Accession number", "search"],
];
const RANGES = [["Today", 0], ["7 days", 6], ["30 days", 29], ["Any date", null]];
const EXTRA = "includefield=StudyDescription";
const COLUMNS = [
  ["Patient", (one) => text(one, "00100010")],
  ["ID", (one) => text(one, "00100020")],
  ["Date", (one) => date(one, "00080020")],
  ["Modality", (one) => text(one, "00080061")],
  ["Description", (one) => text(one, "00081030")],
  ["Accession", (one) => text(one, "00080050")],
  ["Series", (one) => text(one, "00201206"), "number"],
  ["Instances", (one) => text(one, "00201208"), "number"],
];
const hrefOf = (one) => `#/study/${text(one, "0020000D")}`;

let running = null;

export function studies(query) {
  const form = h("form", { class: "filters", role: "search", submit: (event) => event.preventDefault() },
    FIELDS.map(([name, title, type]) => h("label", {}, title,
      h("input", { name, type, value: query.get(name) ?? "", autocomplete: "off", list: name === "ModalitiesInStudy" ? "modalities" : null }))));
  const known = "CR CT DX ES MG MR NM OT PT RF SC SM SR US XA".split(" ").map((value) => h("option", { value }));
  const ranges = RANGES.map(([title, days]) => h("button", { type: "button", click: () => {
    form.from.value = days === null ? "" : day(-days);
    form.to.value = days === null ? "" : day(0);
    answer();
  } }, title));
  const clear = h("button", { type: "button", click: () => { form.reset(); for (const one of form) one.value = ""; answer(); } }, "Clear");
  const found = h("div", { "aria-live": "polite" });
  let timer = 0;
  const answer = () => {
    const asked = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    history.replaceState(null, "", `#/studies${asked.size ? `?${asked}` : ""}`);
    list(asked, found);
  };
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(answer, PAUSE_MS); });
  show(h("h1", {}, "Studies"), form, h("datalist", { id: "modalities" }, known), h("div", { class: "actions" }, ranges, clear), found);
  list(query, found);
}

function day(offset) {
  const at = new Date();
  at.setDate(at.getDate() + offset);
  return `${at.getFullYear()}-${String(at.getMonth() + 1).padStart(2, "0")}-${String(at.getDate()).padStart(2, "0")}`;
}

// What is typed is looked for anywhere in a value; wild cards of one's own count as they stand.
function wild(value) {
  return /[*?]/.test(value) ? value : `*${value}*`;
}

function path(asked) {
  const keys = new URLSearchParams({ limit: PAGE });
  for (const [name] of FIELDS) {
    const value = asked.get(name)?.trim();
    if (!value || name === "from" || name === "to") continue;
    keys.set(name, name === "ModalitiesInStudy" ? value.toUpperCase() : wild(value));
  }
  const [from, to] = ["from", "to"].map((name) => (asked.get(name) ?? "").replaceAll("-", ""));
  if (from || to) keys.set("StudyDate", from === to ? from : `${from}-${to}`);
  return `${ROOT}/studies?${keys}&${EXTRA}`;
}

async function list(asked, place) {
  running?.abort();
  const mine = running = new AbortController();
  try {
    let found = await search(path(asked), mine.signal);
    const description = asked.get("StudyDescription") ?? "";
    if (!found.rows.length && description !== description.toUpperCase()) {  // descriptions match with their case (PS3.4 C.2.2.2)
      const upper = new URLSearchParams(asked);
      upper.set("StudyDescription", description.toUpperCase());
      found = await search(path(upper), mine.signal);
    }
    if (mine === running) fill(place, found);
  } catch (error) {
    if (error.name !== "AbortError") place.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
  }
}

function fill(place, found) {
  const shown = table(COLUMNS, found.rows, hrefOf);
  const note = h("p", { class: "note" });
  const more = h("button", { type: "button", click: async () => {
    const next = await search(found.next);
    shown.tBodies[0].append(...next.rows.map((row) => line(COLUMNS, row, hrefOf)));
    found = next;
    tell();
  } }, "Show more");
  const tell = () => {
    const count = shown.tBodies[0].rows.length;
    note.textContent = found.left ? `${count} of ${count + found.left} studies` : count === 1 ? "1 study" : `${count} studies`;
    more.hidden = !found.next;
  };
  tell();
  place.replaceChildren(note, ...(found.rows.length ? [shown] : []), more);
}
