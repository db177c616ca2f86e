// A study, its series, their instances as thumbnails, and a header.

import { annotations } from "./annotations.js";
import { ROOT, ZIP, date, download, json, picture, search, text } from "./api.js";
import { facts, h, show } from "./dom.js";
import { headerTable } from "./header.js";

const PAGE = 200;
const NAMES = "includefield=StudyDescription,PatientBirthDate,PatientSex,StudyTime,InstitutionName";

function downloads(path, name) {
  const save = (query, ending) => download(`${path}?${ZIP}${query}`, `${name}${ending}.zip`, "application/zip");
  return [
    h("button", { type: "button", click: () => save("", "") }, "Download ZIP"),
    h("button", { type: "button", click: () => save("&dicomdir=true", "-dicomdir") }, "ZIP with DICOMDIR"),
  ];
}

function up(href, title) {
  return h("a", { href, class: "up" }, `← ${title}`);
}

export async function study(uid) {
  const path = `${ROOT}/studies/${uid}`;
  const [about, series] = await Promise.all([
    search(`${ROOT}/studies?StudyInstanceUID=${uid}&${NAMES}`), search(`${path}/series`)]);
  if (!about.rows.length) throw new Error("There is no such study.");
  const one = about.rows[0];
  series.rows.sort((a, b) => Number(text(a, "00200011")) - Number(text(b, "00200011")));
  const cards = series.rows.map((item) => {
    const [series_uid, description] = [text(item, "0020000E"), text(item, "0008103E")];
    return h("li", {}, h("a", { class: "card item", href: `#/study/${uid}/series/${series_uid}` },
      picture(`${path}/series/${series_uid}/thumbnail`, description || "Series"),
      h("strong", {}, `${text(item, "00200011")} ${text(item, "00080060")}`), h("span", {}, description),
      h("span", { class: "note" }, `${text(item, "00201209")} instances`)));
  });
  const viewer = h("a", { class: "button", href: `/viewer/viewer?StudyInstanceUIDs=${uid}`, hidden: true }, "Open in the viewer");
  fetch("/viewer/", { method: "HEAD" }).then((response) => { viewer.hidden = !response.ok; }, () => {});
  show(up("#/studies", "Studies"), h("h1", {}, text(one, "00100010") || "(no name)"),
    facts([
      ["Patient ID", text(one, "00100020")], ["Born", date(one, "00100030")], ["Sex", text(one, "00100040")],
      ["Study", text(one, "00081030")], ["Date", `${date(one, "00080020")} ${text(one, "00080030").slice(0, 6)}`.trim()],
      ["Accession number", text(one, "00080050")], ["Referring physician", text(one, "00080090")],
      ["Study Instance UID", uid],
    ]),
    h("div", { class: "actions" }, viewer, downloads(path, `study-${uid}`)),
    h("h2", {}, `${series.rows.length} series`), h("ul", { class: "grid" }, cards), annotations(uid));
}

export async function series(study_uid, uid) {
  const path = `${ROOT}/studies/${study_uid}/series/${uid}`;
  const first = `${path}/instances?limit=${PAGE}`;
  const [about, found] = await Promise.all([
    search(`${ROOT}/studies/${study_uid}/series?SeriesInstanceUID=${uid}`), search(first)]);
  if (!about.rows.length) throw new Error("There is no such series.");
  const grid = h("ul", { class: "grid" });
  let page = found;
  const more = h("button", { type: "button", click: async () => { page = await search(page.next); add(); } }, "Show more");
  const add = () => {
    const sorted = page.rows.sort((a, b) => Number(text(a, "00200013")) - Number(text(b, "00200013")));
    grid.append(...sorted.map((item) => card(study_uid, uid, path, item)));
    more.hidden = !page.next;
  };
  add();
  const one = about.rows[0];
  show(up(`#/study/${study_uid}`, "Study"),
    h("h1", {}, `${text(one, "00200011")} ${text(one, "00080060")} ${text(one, "0008103E")}`),
    facts([["Series Instance UID", uid], ["Instances", text(one, "00201209")]]),
    h("div", { class: "actions" }, downloads(path, `series-${uid}`)), grid, more);
}

function card(study_uid, series_uid, path, item) {
  const [uid, number, frames] = [text(item, "00080018"), text(item, "00200013"), text(item, "00280008")];
  return h("li", {}, h("a", { class: "card item", href: `#/study/${study_uid}/series/${series_uid}/instance/${uid}` },
    picture(`${path}/instances/${uid}/thumbnail`, `Instance ${number}`),
    h("span", {}, number || uid), Number(frames) > 1 ? h("span", { class: "note" }, `${frames} frames`) : null));
}

export async function instance(study_uid, series_uid, uid) {
  const path = `${ROOT}/studies/${study_uid}/series/${series_uid}/instances/${uid}`;
  const [headers, names] = await Promise.all([
    json(`${path}/metadata`, { accept: "application/dicom+json" }), json("/page/dictionary.json")]);
  const one = headers[0];
  show(up(`#/study/${study_uid}/series/${series_uid}`, "Series"),
    h("h1", {}, `${text(one, "00100010")} ${text(one, "00200013")}`.trim() || uid),
    h("div", { class: "actions" }, downloads(path, `instance-${uid}`)),
    h("div", { class: "two" }, h("div", {}, picture(`${path}/rendered`, "The image")), headerTable(one, names)));
}
