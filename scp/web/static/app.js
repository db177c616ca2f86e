// Views by address, keys, and dark or light.

import { readAhead } from "./ahead.js";
import { h, show } from "./dom.js";
import * as state from "./state.js";
import { instance, series, study } from "./study.js";
import { studies } from "./studies.js";

const VIEWS = [
  ["studies", "Studies"], ["arrivals", "Arrivals"], ["quarantine", "Quarantine"], ["peers", "Peers"], ["storage", "Storage"],
  ["errors", "Errors"],
];
const ROLES = ["researcher", "reader", "writer", "admin"];
const LEAST = { arrivals: "reader", quarantine: "writer", peers: "writer", storage: "writer", errors: "writer" };
const ROUTES = [
  [/^studies$/, (query) => studies(query)],
  [/^arrivals$/, () => state.arrivals()],
  [/^quarantine$/, (query) => state.quarantine(query)],
  [/^peers$/, () => state.peers()],
  [/^storage$/, () => state.storage()],
  [/^errors$/, () => state.errors()],
  [/^study\/([0-9.]+)$/, (_, uid) => study(uid)],
  [/^study\/([0-9.]+)\/series\/([0-9.]+)$/, (_, ...uids) => series(...uids)],
  [/^study\/([0-9.]+)\/series\/([0-9.]+)\/instance\/([0-9.]+)$/, (_, ...uids) => instance(...uids)],
];

async function route() {
  const [path, query = ""] = (location.hash.slice(2) || "studies").split("?");
  for (const link of document.querySelectorAll("nav a")) {
    const mine = link.hash.slice(2) === path.split("/")[0].replace(/^study$/, "studies");
    if (mine) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  for (const [pattern, view] of ROUTES) {
    const match = pattern.exec(path);
    if (!match) continue;
    state.leave();
    try {
      await view(new URLSearchParams(query), ...match.slice(1));
    } catch (error) {
      show(h("p", { class: "error", role: "alert" }, error.message));
    }
    return;
  }
  show(h("p", { class: "error", role: "alert" }, "There is no such view."));
}

function turn() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("sphere-theme", root.dataset.theme);
}

function move(step) {
  const items = [...document.querySelectorAll("main .item")];
  const at = items.indexOf(document.activeElement);
  const next = items[at < 0 ? (step > 0 ? 0 : items.length - 1) : at + step];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

const KEYS = {
  "/": () => document.querySelector("main input")?.focus(),
  "j": () => move(1), "ArrowDown": () => move(1), "ArrowRight": () => move(1),
  "k": () => move(-1), "ArrowUp": () => move(-1), "ArrowLeft": () => move(-1),
  "t": turn,
  "?": () => document.getElementById("help").showModal(),
  "Escape": () => document.querySelector("main a.up")?.click(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    else if (event.key === "ArrowDown" && event.target.type === "search") { event.preventDefault(); move(1); }
    return;
  }
  const view = document.querySelectorAll("nav a")[Number(event.key) - 1];
  const action = view ? () => { if (!view.hidden) location.hash = view.hash; } : KEYS[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});

document.documentElement.dataset.theme = localStorage.getItem("sphere-theme")
  ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.querySelector("nav").append(...VIEWS.map(([name, title]) => h("a", { href: `#/${name}` }, title)));
document.getElementById("theme").addEventListener("click", turn);
document.getElementById("keys").addEventListener("click", KEYS["?"]);
addEventListener("hashchange", route);
route().then(readAhead);
state.live((role) => {
  for (const link of document.querySelectorAll("nav a")) {
    link.hidden = ROLES.indexOf(role) < ROLES.indexOf(LEAST[link.hash.slice(2)]);
  }
});
