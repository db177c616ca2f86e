// The state of the archive: arrivals and jobs as they happen, quarantine, peers, storage, errors.

import { ROOT, ask, json, roleIn, search, text } from "./api.js";
import { bytes, facts, h, show, table, when } from "./dom.js";

const EVERY_MS = 5_000; // between two questions, while somebody looks
const NAMED = 50; // studies whose patients are asked for
const number = (value) => Number(value).toLocaleString();

let current = null; // the view that is refreshed: [ask, draw, the last answer as text]
let timer = 0;

// Show a view now, and again when its answer changes, until another is shown.
export async function watch(asked, draw) {
  current = [asked, draw, null];
  await refresh(current);
}

export function leave() {
  current = null;
}

async function refresh(view) {
  const [asked, draw, last] = view;
  const answer = await asked();
  const told = JSON.stringify(answer);
  if (view !== current || told === last) return;
  view[2] = told;
  const focused = document.activeElement?.getAttribute("href");
  draw(answer);
  if (focused) [...document.querySelectorAll("main .item")].find((one) => one.getAttribute("href") === focused)?.focus();
}

// One line about the archive, everywhere; `told` gets the role of who looks each time that the archive says it.
export async function live(told) {
  const place = document.getElementById("live");
  const tick = async () => {
    if (!document.hidden) {
      try {
        const response = await ask("/status");
        told(roleIn(response));
        place.textContent = summary(await response.json());
        if (current) await refresh(current);
      } catch (error) {
        place.textContent = error.status === 403 ? "" : `no answer: ${error.message}`;
        if (error.status === 403) {
          told(error.role);
          return;
        }
      }
    }
    timer = setTimeout(tick, EVERY_MS);
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { clearTimeout(timer); tick(); } });
  await tick();
}

function summary(now) {
  const parts = [`${number(now.landed)} instances`];
  if (now.waiting) parts.push(`${number(now.waiting)} waiting`);
  if (now.extraction && !now.extraction.ended_at) parts.push(`extracting: ${step(now.extraction)}`);
  const down = now.processes.filter((one) => one.state !== "ready").map((one) => one.name);
  if (down.length) parts.push(`not ready: ${down.join(", ")}`);
  return parts.join(" · ");
}

function step(job) {
  return job.total ? `${job.step} ${Math.round((100 * job.done) / job.total)} %` : job.step;
}

export function arrivals() {
  return watch(async () => {
    const [now, studies] = await Promise.all([json("/status"), json("/status/arrivals")]);
    const uids = [...new Set(studies.map((one) => one.study).filter((uid) => /^[0-9.]+$/.test(uid)))].slice(0, NAMED);
    const known = uids.length ? (await search(`${ROOT}/studies?StudyInstanceUID=${uids.join(",")}&includefield=StudyDescription`)).rows : [];
    return { now, studies, known };
  }, ({ now, studies, known }) => {
    const of = new Map(known.map((one) => [text(one, "0020000D"), one]));
    const value = (one, tag) => (of.has(one.study) ? text(of.get(one.study), tag) : "");
    show(h("h1", {}, "Arrivals and jobs"), jobs(now), h("h2", {}, "Latest arrivals"), studies.length ? table([
      ["Patient", (one) => value(one, "00100010") || one.study || "(not identified)"],
      ["Modality", (one) => value(one, "00080061")],
      ["Description", (one) => value(one, "00081030")],
      ["From", (one) => [one.source_aet, one.origin].filter(Boolean).join(", ")],
      ["Instances", (one) => number(one.instances), "number"],
      ["Size", (one) => bytes(one.bytes), "number"],
      ["Last", (one) => when(one.last_at)],
    ], studies, (one) => (of.has(one.study) ? `#/study/${one.study}` : null)) : h("p", { class: "note" }, "Nothing has arrived yet."));
  });
}

function jobs(now) {
  const job = now.extraction;
  const last = !job ? "" : !job.ended_at ? `${step(job)}, since ${when(job.began_at)}` : `${when(job.ended_at)}: ${job.outcome}`;
  return h("div", {},
    facts([["Landed", `${number(now.landed)} instances`], ["Waiting for extraction", number(now.waiting)],
      ["Extraction", h("span", { class: job?.failed ? "error" : null }, last || "not yet")],
      ["Spool", now.spool ? `${number(now.spool.bundles)} bundles, ${bytes(now.spool.bytes)} ${now.spool.error}` : ""],
      ["Damaged bundles", now.damaged ? h("span", { class: "error" }, `${number(now.damaged)} (sphere status names them)`) : ""]]),
    now.forwards.length ? [h("h2", {}, "Forwards"), table([
      ["Forward", (one) => one.forward], ["To", (one) => one.destination], ["Sent", (one) => number(one.sent ?? 0), "number"],
      ["Waiting", (one) => number(one.waiting ?? 0), "number"], ["Last failure", (one) => h("span", { class: "error" }, one.last_error ?? "")],
    ], now.forwards)] : null,
    now.processes.length ? [h("h2", {}, "Processes"), table([
      ["Process", (one) => one.name], ["State", (one) => h("span", { class: one.state === "ready" ? "good" : "error" }, one.state)],
      ["Restarts", (one) => one.restarts, "number"], ["Last end", (one) => one.last_end],
    ], now.processes)] : h("p", { class: "note" }, "No sphere serve tells its state here."));
}

const PAGE = 100;

export function quarantine(query) {
  const offset = Number(query.get("offset") ?? 0);
  return watch(() => json(`/status/quarantine?limit=${PAGE}&offset=${offset}`), ({ total, reasons, members }) => {
    const to = (at, title) => h("a", { class: "button", href: `#/quarantine?offset=${at}` }, title);
    show(h("h1", {}, "Quarantine"),
      h("p", { class: "note" }, total ? `${number(total)} members could not be catalogued; their bytes are kept.` : "Empty: everything could be catalogued."),
      facts(Object.entries(reasons).map(([reason, count]) => [reason, number(count)])),
      members.length ? table([
        ["Reason", (one) => one.reason], ["Detail", (one) => one.detail], ["Received", (one) => when(one.received_ms)],
        ["From", (one) => [one.source_aet, one.origin].filter(Boolean).join(", ")], ["Size", (one) => bytes(one.length), "number"],
        ["SOP Instance UID", (one) => one.SOPInstanceUID], ["Bundle", (one) => `${one.bundle} at ${one.offset}`],
      ], members) : null,
      h("div", { class: "actions" }, offset ? to(Math.max(0, offset - PAGE), "Earlier") : null,
        offset + PAGE < total ? to(offset + PAGE, "More") : null));
  });
}

export function peers() {
  const draw = (all) => {
    const again = h("button", { type: "button", click: async () => {
      again.disabled = true;
      try {
        draw(await json("/status/peers", { method: "POST" }));
      } catch (error) {
        show(h("p", { class: "error", role: "alert" }, error.message));
      }
    } }, "Echo now");
    show(h("h1", {}, "Peers"), h("div", { class: "actions" }, all.length ? again : null), all.length ? table([
      ["Name", (one) => one.name], ["AE title", (one) => one.ae_title], ["Address", (one) => `${one.host}:${one.port}`],
      ["May", (one) => one.may.join(", ") || "nothing"], ["Last echo", (one) => when(one.at)],
      ["Answer", (one) => h("span", { class: one.error ? "error" : "good" }, one.error || (one.ms === null ? "" : `${Math.round(one.ms)} ms`))],
    ], all) : h("p", { class: "note" }, "The settings name no [[peers]]."));
  };
  return watch(() => json("/status/peers"), draw);
}

export function storage() {
  return watch(() => json("/status/storage"), (one) => {
    show(h("h1", {}, "Storage"), facts([
      ["Storage", one.storage_root], ["Catalog", one.catalog_root],
      ["Bundles", `${number(one.bundles)} (${number(one.bundles_open)} open), ${bytes(one.bytes)}`], ["Members", number(one.members)],
      ["Deleted", one.deleted ? `${number(one.deleted)} instances; their bytes go at compaction` : ""],
      ["Disk", one.disk ? `${bytes(one.disk.free)} free of ${bytes(one.disk.total)}` : ""],
    ]), h("h2", {}, "Catalog"), facts(Object.entries(one.tables).map(([name, count]) => [name, number(count)])));
  });
}

export function errors() {
  return watch(() => json("/status/errors"), (all) => {
    show(h("h1", {}, "Errors"), all.length ? table([
      ["Time", (one) => when(one.at)], ["Level", (one) => h("span", { class: one.level === "WARNING" ? null : "error" }, one.level.toLowerCase())],
      ["Process", (one) => one.process], ["Message", (one) => one.message],
    ], all) : h("p", { class: "note" }, "No process of this host has logged a warning."));
  });
}
