// The page, kept live: what the event stream says is shown at once; what it does not say is asked of the server again.
// Without this script the page reads as well, and every form works.

const body = document.body;
const policy = body.dataset.policy;
const windows = { revalidate: Number(body.dataset.revalidate), error: Number(body.dataset.error) };
const SOURCES = { memory: "this process", store: "another process", api: "the API" };
const PARTS_SOON = 250; // ms: several changes in a row are one question
const PARTS_EVERY = 10_000; // ms: members report every ten seconds
const AGAIN = 3_000; // ms: the least before a stream that was refused is asked for again

const states = new Map(); // tenant -> { state, at }
const boxes = new Map([...document.querySelectorAll("[data-tenant]")].map((box) => [box.dataset.tenant, box]));

// -- words, as the server puts them ---------------------------------------------------------------------------------

const two = (number) => String(number).padStart(2, "0");

function span(seconds) {
  if (seconds === null) return "—";
  const whole = Math.max(0, Math.trunc(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.trunc(whole / 60);
  if (minutes < 60) return `${minutes} min ${two(whole % 60)} s`;
  const hours = Math.trunc(minutes / 60);
  return hours < 24 ? `${hours} h ${two(minutes % 60)} min` : `${Math.trunc(hours / 24)} d ${hours % 24} h`;
}

/** A generation in Redis is a time in milliseconds, too long for its columns. */
const generationOf = (number) => (number < 1e9 ? String(number) : `…${String(number % 1e6).padStart(6, "0")}`);

const wordOf = (enabled) => (enabled === null ? "unknown" : enabled ? "ON" : "OFF");

/** The state as it is `elapsed` seconds after it was told: time alone makes a value stale, whether a word came or not. */
function aged(told, elapsed) {
  const state = { ...told };
  if (told.age_seconds !== null) {
    state.age_seconds = told.age_seconds + elapsed;
    state.fresh_seconds = told.fresh_seconds - elapsed;
    if (told.freshness === "fresh" && state.fresh_seconds < 0) state.freshness = "stale";
    const stale = -state.fresh_seconds;
    if (state.freshness === "stale" && stale >= windows.revalidate && !(state.failures && stale < windows.error)) {
      state.freshness = "expired";
    }
  }
  if (told.retry_seconds !== null) state.retry_seconds = Math.max(0, told.retry_seconds - elapsed);
  return state;
}

const isUnasked = (state) =>
  Boolean(body.dataset.lazy) && !state.failures && state.freshness === "expired" && state.enabled !== null;

function flagOf(state) {
  if (state.freshness !== "expired" || policy === "last" || isUnasked(state)) {
    return state.enabled === null ? "none" : state.enabled ? "on" : "off";
  }
  return policy === "default" ? "none" : policy;
}

function meaning(state, flag) {
  const owner =
    flag === "on" ? "The external OMS owns the orders"
    : flag === "off" ? "The tenant's own order management owns the orders"
    : "Each caller's own default decides";
  if (state.freshness !== "expired") return `${owner}.`;
  if (isUnasked(state)) {
    return `${owner}, as far as is known. Nobody has asked for a while; the next evaluation reads it first.`;
  }
  const last = state.enabled === null ? "No value was ever read" : `The last known value was ${wordOf(state.enabled)}`;
  return `${owner}, by when_expired = ${policy}. ${last}.`;
}

function freshness(state) {
  const fresh = state.fresh_seconds;
  if (fresh === null) return state.failures ? "No value: every read so far has failed" : "No value yet";
  if (state.freshness === "fresh") return `Fresh for another ${span(fresh)}`;
  if (state.freshness === "expired") return `Expired: not fresh for ${span(-fresh)}, too old to serve`;
  if (!state.failures) return `Stale for ${span(-fresh)}; a read is due`;
  const left = Math.max(windows.error, windows.revalidate) + fresh;
  return `Stale for ${span(-fresh)}; served for another ${span(left)} while reads fail`;
}

function toneOf(state) {
  if (state.freshness === "expired" && !isUnasked(state)) return "bad";
  return state.failures || state.last_error ? "warn" : "good";
}

// -- showing --------------------------------------------------------------------------------------------------------

function put(box, field, text) {
  for (const place of box.querySelectorAll(`[data-field="${field}"]`)) {
    if (place.textContent !== text) place.textContent = text;
  }
}

function show(tenant) {
  const box = boxes.get(tenant);
  const known = states.get(tenant);
  if (!box || !known || box.hidden) return;
  const state = aged(known.state, (performance.now() - known.at) / 1000);
  const flag = flagOf(state);
  const tone = toneOf(state);
  if (box.dataset.flag !== flag) turn(box, tenant, flag);
  if (!box.classList.contains(tone)) {
    box.classList.remove("good", "warn", "bad");
    box.classList.add(tone);
  }
  put(box, "meaning", meaning(state, flag));
  put(box, "freshness", freshness(state));
  put(box, "age", span(state.age_seconds));
  put(box, "generation", generationOf(state.generation));
  for (const place of box.querySelectorAll('[data-field="generation"]')) place.title = String(state.generation);
  put(box, "source", state.enabled === null ? "—" : SOURCES[state.source]);
  const next = state.enabled === null ? "now" : "when the value ages";
  put(box, "retry", state.retry_seconds ? `in ${span(state.retry_seconds)}` : next);
  const life = box.querySelector('[data-field="life"]');
  if (life) {
    life.max = Math.max(0.001, (state.age_seconds ?? 0) + (state.fresh_seconds ?? 0) || 1);
    life.value = Math.max(0, state.fresh_seconds ?? 0);
  }
  const error = box.querySelector('[data-field="error"]');
  if (error) {
    error.hidden = !state.last_error;
    put(box, "last_error", state.last_error ?? "");
    put(box, "failures", state.failures > 1 ? ` (${state.failures} in a row)` : "");
  }
}

function turn(box, tenant, flag) {
  box.dataset.flag = flag;
  const word = flag === "none" ? "NO VALUE" : flag.toUpperCase();
  put(box, "word", word);
  box.classList.remove("changed");
  void box.offsetWidth; // begins the animation anew
  box.classList.add("changed");
  say(`${tenant} is ${word} now`);
}

function say(text) {
  const said = document.getElementById("said");
  said.textContent = said.textContent && Date.now() - say.last < 2_000 ? `${said.textContent}. ${text}` : text;
  say.last = Date.now();
}

function tick() {
  if (!document.hidden) for (const tenant of states.keys()) show(tenant);
}

// -- what the stream does not say: the server's own words for summary, members, deliveries and the timeline ---------

let partsDue = null;

function askParts(delay) {
  clearTimeout(partsDue);
  partsDue = setTimeout(fetchParts, delay);
}

async function fetchParts() {
  askParts(PARTS_EVERY * (0.9 + Math.random() / 5));
  if (document.hidden) return;
  const address = new URL(location.href);
  address.searchParams.set("parts", "1");
  try {
    const answer = await fetch(address, { redirect: "manual" });
    if (answer.type === "opaqueredirect") return ended();
    if (answer.ok) swapParts(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch {
    // the stream says on top that the server is away
  }
}

function swapParts(fresh) {
  document.title = fresh.title;
  for (const part of fresh.querySelectorAll("[data-part]")) {
    const here = document.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
    if (here && !here.contains(document.activeElement) && here.outerHTML !== part.outerHTML) {
      here.replaceWith(document.importNode(part, true));
    }
  }
  for (const tenant of states.keys()) show(tenant);
}

// -- the stream -----------------------------------------------------------------------------------------------------

let stream = null;
let waits = null;

function live(kind, text) {
  const place = document.getElementById("live");
  place.hidden = false;
  place.className = `live ${kind}`;
  if (place.textContent !== text) place.textContent = text;
}

function ended() {
  stream?.close();
  stream = null;
  clearTimeout(partsDue);
  live("ended", "");
  const link = document.createElement("a");
  link.href = body.dataset.login;
  link.textContent = "The login has ended: log in again";
  document.getElementById("live").replaceChildren(link);
}

function open() {
  clearTimeout(waits);
  if (stream || document.hidden) return;
  stream = new EventSource(body.dataset.events);
  stream.addEventListener("open", () => {
    live("on", "Live");
    askParts(PARTS_SOON);
  });
  stream.addEventListener("state", (event) => {
    const { change, state } = JSON.parse(event.data);
    states.set(state.tenant, { state, at: performance.now() });
    show(state.tenant);
    if (change) askParts(PARTS_SOON + (change === "value" ? 0 : Math.random() * 750));
  });
  stream.addEventListener("error", () => {
    live("waits", "Not live: connecting again");
    if (stream?.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    stream = null;
    fetchParts(); // tells whether the login has ended
    waits = setTimeout(open, AGAIN * (1 + Math.random()));
  });
}

// A browser opens six connections to a host: a page that nobody sees must not hold one of them.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) return open();
  stream?.close();
  stream = null;
});

if (body.dataset.secondsLeft) {
  const left = Number(body.dataset.secondsLeft) * 1000;
  if (left < 2 ** 31) setTimeout(ended, left);
}

// -- the filter -----------------------------------------------------------------------------------------------------

const filter = document.querySelector(".filter");

function sift() {
  const wanted = filter.q.value.trim().toLowerCase();
  const kind = filter.show.value;
  let matches = 0;
  for (const [tenant, box] of boxes) {
    const needy = !box.classList.contains("good") || "lagging" in box.dataset;
    const fits = tenant.includes(wanted) && (!kind || (kind === "attention" ? needy : box.dataset.flag === kind));
    box.hidden = !fits;
    matches += fits;
    if (fits) show(tenant);
  }
  document.getElementById("matches").textContent = `${matches.toLocaleString("en")} of ${boxes.size.toLocaleString("en")}`;
}

if (filter && boxes.size) {
  document.getElementById("apply").hidden = true;
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("input", () => {
    sift();
    const address = new URL(location.href);
    for (const field of [filter.q, filter.show]) {
      if (field.value) address.searchParams.set(field.name, field.value);
      else address.searchParams.delete(field.name);
    }
    history.replaceState(null, "", address);
  });
  sift();
}

document.getElementById("still").hidden = true;
setInterval(tick, 1_000);
open();
askParts(PARTS_EVERY);
