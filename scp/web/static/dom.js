// Elements from data: every text becomes a text node, never markup.

export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export function show(...children) {
  const main = document.getElementById("main");
  main.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

// A list as a table that becomes cards on a phone: columns are [title, (row) => text or element, class].
export function table(columns, rows, hrefOf) {
  const body = h("tbody", {}, rows.map((row) => line(columns, row, hrefOf)));
  const titles = columns.map(([title, , kind]) => h("th", { scope: "col", class: kind }, title));
  return h("table", { class: "list" }, h("thead", {}, h("tr", {}, titles)), body);
}

export function line(columns, row, hrefOf) {
  const href = hrefOf?.(row);
  const cells = columns.map(([title, text, kind], index) => {
    const content = text(row) ?? "";
    const inner = href && index === 0 ? h("a", { href, class: "item" }, content || "(none)") : content;
    return h("td", { class: kind, "data-label": title }, inner);
  });
  const open = (event) => { if (!event.target.closest("a") && !String(getSelection())) location.hash = href; };
  return h("tr", href ? { class: "open", click: open } : {}, cells);
}

export function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter(([, text]) => text !== "" && text !== undefined && text !== null)
    .map(([title, text]) => [h("dt", {}, title), h("dd", {}, text instanceof Node ? text : String(text))]));
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  const step = size > 0 ? Math.min(units.length - 1, Math.floor(Math.log10(size) / 3)) : 0;
  return `${(size / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

export function when(iso) {
  return iso ? new Date(iso).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" }) : "never";
}
