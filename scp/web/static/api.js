// What this page asks the server: DICOMweb, and the state of the archive. A token stays in this tab.

const KEY = "sphere.token"; // the viewer reads it too
export const ROOT = "/dicom-web";
export const ZIP = "accept=application/zip";

export class Refused extends Error {
  constructor(status, text, role) {
    super(text);
    [this.status, this.role] = [status, role];
  }
}

let asking = null;

export async function ask(path, { accept = "application/json", method = "GET", signal } = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const headers = { Accept: accept, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const response = await fetch(path, { method, headers, signal });
    if (response.status !== 401) {
      if (!response.ok) throw new Refused(response.status, await reason(response), roleIn(response));
      return response;
    }
    if (token && token === sessionStorage.getItem(KEY)) sessionStorage.removeItem(KEY);
    asking ??= askToken(Boolean(token)).finally(() => { asking = null; });
    await asking;
  }
}

// Of who asks, where the answer tells it; "" where nothing may be seen.
export function roleIn(response) {
  return response.headers.get("x-sphere-role") ?? "";
}

async function reason(response) {
  try {
    return (await response.json()).detail ?? response.statusText;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function askToken(again) {
  const dialog = document.getElementById("token");
  const [form, input] = [dialog.querySelector("form"), dialog.querySelector("input")];
  dialog.querySelector(".error").textContent = again ? "This token is not, or no longer, valid." : "";
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      input.value = "";
      dialog.close();
      resolve();
    };
    dialog.showModal();
  });
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

// Matches of a search, and the path of the next page where there is one.
export async function search(path, signal) {
  const response = await ask(path, { accept: "application/dicom+json", signal });
  const next = /<([^>]+)>; rel="next"/.exec(response.headers.get("link") ?? "");
  const left = /There are (\d+) additional/.exec(response.headers.get("warning") ?? "");
  const rows = response.status === 204 ? [] : await response.json();
  return { rows, next: next ? new URL(next[1]).pathname + new URL(next[1]).search : "", left: left ? Number(left[1]) : 0 };
}

export function text(object, tag) {
  return (object[tag]?.Value ?? []).map(plain).join(", ");
}

export function plain(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "object") return String(value);
  return ["Alphabetic", "Ideographic", "Phonetic"].map((group) => value[group]).filter(Boolean).join(" = ");
}

export function date(object, tag) {
  return text(object, tag).replace(/^(\d{4})(\d{2})(\d{2})$/, "$1-$2-$3");
}

// Images come when they are seen, and with the token.
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) {
      waiting.unobserve(target);
      load(target);
    }
  }
}, { rootMargin: "200px" });

export function picture(path, description) {
  const place = document.createElement("div");
  place.className = "picture";
  place.dataset.path = path;
  place.dataset.description = description;
  waiting.observe(place);
  return place;
}

async function load(place) {
  try {
    const response = await ask(place.dataset.path, { accept: "image/jpeg, image/png;q=0.9" });
    const image = new Image();
    image.alt = place.dataset.description;
    image.src = URL.createObjectURL(await response.blob());
    image.onload = () => URL.revokeObjectURL(image.src);
    place.replaceChildren(image);
  } catch (error) {
    place.textContent = error.status === 404 || error.status === 406 ? "no image" : String(error.message);
  }
}

// A file: the browser's own download where it needs no token, else into a file or memory.
export async function download(path, name, accept) {
  const token = sessionStorage.getItem(KEY);
  if (!token) {
    const link = document.createElement("a");
    [link.href, link.download] = [path, name];
    link.click();
    return;
  }
  const file = window.showSaveFilePicker ? await window.showSaveFilePicker({ suggestedName: name }) : null;
  const response = await ask(path, { accept });
  if (file) {
    await response.body.pipeTo(await file.createWritable());
    return;
  }
  const link = document.createElement("a");
  [link.href, link.download] = [URL.createObjectURL(await response.blob()), name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
