// The viewer's scripts, read ahead and compiled by a service worker: a study opens sooner. Where there is no viewer, or no
// service worker (not loopback and no TLS, or the person wants none), it opens as it did.

export async function readAhead() {
  if (!navigator.serviceWorker || navigator.connection?.saveData) return;
  const worker = "/viewer/service-worker.js";
  try {
    const answer = await fetch(worker, { method: "HEAD" });
    if (!answer.ok) return;
    const found = await navigator.serviceWorker.register(worker, { scope: "/viewer/" });
    if (found.active) await found.update();  // to register it again does not ask whether there is another build
  } catch (error) {
    console.info(`The viewer is not read ahead: ${error.message}`);
  }
}
