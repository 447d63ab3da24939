// Keeps the page up to date. The server renders every word: on an event, or when a countdown ends, the script fetches the
// rendered parts again and swaps them in. It formats durations only, because ages tick. Without it the page reads as well.

const body = document.body;
const live = document.getElementById("live");
const said = document.getElementById("said");
const inRows = document.querySelector(".rows") !== null; // many tenants: only the rows that changed are fetched
const MESSAGE = 10_000; // ms: how long a message of success stays
const SOON = 150; // ms: several changes in a row are one fetch
const POLL = { on: 10_000, off: 3_000, polling: 3_000 }; // ms between fetches without an event; processes report every 10 s
const RETRY = 30_000; // ms until a refused event stream is tried again

// -- ticking --------------------------------------------------------------------------------------------------------

/** As `format_duration` of the server. */
function duration(seconds) {
  const whole = Math.max(0, Math.trunc(seconds));
  const [minutes, hours, days] = [60, 3600, 86400].map((unit) => Math.trunc(whole / unit));
  const two = (number) => String(number % 60).padStart(2, "0");
  if (!minutes) return `${whole} s`;
  if (!hours) return `${minutes} min ${two(whole)} s`;
  return days ? `${days} d ${hours % 24} h` : `${hours} h ${two(minutes)} min`;
}

function tick() {
  if (document.hidden) return;
  for (const place of document.querySelectorAll("[data-seconds]")) {
    place.since ??= performance.now();
    const seconds = Number(place.dataset.seconds) + (Number(place.dataset.step) * (performance.now() - place.since)) / 1000;
    if (place.localName === "progress") place.value = Math.max(0, seconds);
    else place.textContent = duration(seconds);
    if (seconds <= 0 && Number(place.dataset.seconds) > 0 && !place.ended) {
      place.ended = true; // a countdown: what is so now comes with the next parts
      changed(place.closest("[data-tenant]")?.dataset.tenant);
    }
  }
}

// -- fetching the parts ---------------------------------------------------------------------------------------------

const tenants = new Set(); // those whose rows are fetched next
let timer = null;
let due = Infinity;
let state = "off";

function changed(tenant, delay = SOON) {
  if (tenant) tenants.add(tenant);
  fetchIn(delay);
}

function fetchIn(delay) {
  if (state === "ended" || performance.now() + delay > due) return;
  clearTimeout(timer);
  due = performance.now() + delay;
  timer = setTimeout(fetchParts, delay);
}

async function fetchParts() {
  due = Infinity;
  if (document.hidden) return;
  const address = new URL(location.href);
  address.searchParams.set("parts", "1");
  const named = [...tenants].slice(0, 100);
  if (inRows) address.searchParams.set("tenants", named.join(","));
  for (const tenant of named) tenants.delete(tenant);
  try {
    const response = await fetch(address, { redirect: "manual", signal: AbortSignal.timeout(8_000) });
    if (response.type === "opaqueredirect") return show("ended");
    if (!response.ok) throw new Error(response.status);
    swap(new DOMParser().parseFromString(await response.text(), "text/html"));
    show(stream?.readyState === EventSource.OPEN ? "on" : "polling");
  } catch {
    for (const tenant of named) tenants.add(tenant);
    show("off");
  }
  fetchIn(tenants.size ? SOON * 10 : POLL[state] * (0.9 + Math.random() / 5));
}

function swap(fetched) {
  document.title = fetched.title;
  document.getElementById("as-of").since = performance.now();
  for (const part of fetched.querySelectorAll("[data-part]")) {
    const here = document.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
    if (!here || here.isEqualNode(part)) continue;
    for (const open of here.querySelectorAll("details[open]")) part.querySelector(`#${CSS.escape(open.id)}`).open = true;
    const focused = here.contains(document.activeElement) && document.activeElement.id;
    if (here.dataset.flag !== part.dataset.flag) {
      part.classList.add("changed");
      said.textContent = part.dataset.says;
    }
    here.replaceWith(document.adoptNode(part));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }
}

// -- events ---------------------------------------------------------------------------------------------------------

let stream = null;

function show(now) {
  state = now;
  live.hidden = false;
  body.dataset.state = now;
  if (now === "ended") {
    stream?.close();
    clearTimeout(timer);
  }
}

function open() {
  if (state === "ended" || document.hidden || (stream && stream.readyState !== EventSource.CLOSED)) return;
  stream = new EventSource(body.dataset.events);
  stream.addEventListener("open", () => fetchIn(0));
  stream.addEventListener("state", (event) => {
    const { change, state } = JSON.parse(event.data);
    if (change) changed(state.tenant, change === "value" || !inRows ? SOON : SOON * 10);
  });
  stream.addEventListener("error", () => fetchIn(SOON)); // tells whether the server, the session or only the stream ended
}

// A browser opens six connections to a host: a page that nobody sees must not hold one of them.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return stream?.close();
  fetchIn(0);
  open();
});

if (body.dataset.ends) setTimeout(() => show("ended"), Math.min(Number(body.dataset.ends) * 1000, 2 ** 31 - 1));
setTimeout(() => document.querySelectorAll(".note.good").forEach((note) => note.remove()), MESSAGE);
document.getElementById("still").hidden = true;
setInterval(tick, 1_000);
setInterval(open, RETRY);
open();
fetchIn(POLL.polling);
