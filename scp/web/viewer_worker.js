// The viewer's service worker: has its scripts at hand, which the list of studies had it read ahead. What a browser puts into
// Cache Storage while this is installed, it compiles then, and not when a study is opened. Nothing else is kept or touched:
// no page, no setting, nothing of a patient. The names of these files say what is in them: none can be out of date.
const CACHE = CACHE_NAME;
const FILES = FILE_NAMES;

addEventListener("install", (event) => {
  // where a browser can, it looks here by itself, and asks for all else as if no service worker were there
  event.addRoutes?.([
    { condition: { urlPattern: { pathname: "/viewer/*.bundle.*.js" } }, source: { cacheName: CACHE } },
    { condition: { urlPattern: { pathname: "/*" } }, source: "network" },
  ]).catch(() => {});
  const requests = FILES.map((file) => new Request(file, { cache: "no-cache", credentials: "omit" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)).then(() => skipWaiting()));
});

addEventListener("activate", (event) => {
  const drop = (names) => Promise.all(names.filter((name) => name !== CACHE).map((name) => caches.delete(name)));
  event.waitUntil(caches.keys().then(drop));
});

addEventListener("fetch", (event) => {
  if (!FILES.includes(new URL(event.request.url).pathname)) return;
  const kept = caches.open(CACHE).then((cache) => cache.match(event.request));
  event.respondWith(kept.then((found) => found ?? fetch(event.request)));
});
