"use strict";
// The query browser. All data is inserted as textContent, never as HTML.
(async () => {
  const PAGE = 50;
  const $ = (id) => document.getElementById(id);
  const ends = JSON.parse($("ends").textContent);
  const thumbnails = $("thumbnails").textContent;
  const matches = Number($("content").dataset.matches);
  const data = await unpack($("content").textContent);
  const state = { set: 0, direction: "t2i", low: 1, high: Infinity, order: "set", search: "", found: [], page: 0, at: 0, started: false };
  const lower = data.texts.map(() => null);
  let address;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const current = () => data.sets[state.set];
  const imageOf = (set, caption) => set.owner[caption];
  const queryAt = (set, n) => set[state.direction].query[n];
  const numberOf = (set, query) => set[state.direction === "t2i" ? "textNumber" : "imageNumber"][query];
  const captionsOf = (set, image) => {
    if (!set.byImage) {
      set.byImage = set.images.map(() => []);
      set.owner.forEach((owner, caption) => set.byImage[owner].push(caption));
    }
    return set.byImage[image];
  };
  const textOf = (set, caption) => data.texts[set.texts[caption]];
  const nameOf = (set, image) => data.names[set.images[image]];
  const rankText = (rank) => `rank ${rank.toLocaleString("en")}${Number.isInteger(rank) ? "" : " (tied)"}`;

  // Returns an <img> with the thumbnail, sliced from the page's text, or a box that says that there is none.
  function thumbnail(set, image, alt) {
    const number = set.images[image];
    const start = number ? ends[number - 1] : 0;
    if (ends[number] === start) return make("span", { className: "none", textContent: "no image" });
    const source = "data:image/webp;base64," + thumbnails.slice(start, ends[number]);
    return make("img", { src: source, alt, loading: "lazy", decoding: "async" });
  }

  function holds(text, word) {
    lower[text] ??= data.texts[text].toLowerCase();
    return lower[text].includes(word);
  }

  function fits(set, n) {
    const rank = set[state.direction].rank[n];
    const query = queryAt(set, n);
    if (rank < state.low || rank > state.high) return false;
    if (!state.search) return true;
    const image = state.direction === "t2i" ? imageOf(set, query) : query;
    if (nameOf(set, image).toLowerCase().includes(state.search)) return true;
    const captions = state.direction === "t2i" ? [query] : captionsOf(set, image);
    return captions.some((caption) => holds(set.texts[caption], state.search));
  }

  function find() {
    const set = current();
    const ranks = set[state.direction].rank;
    state.found = [...ranks.keys()].filter((n) => fits(set, n));
    if (state.order === "worst") state.found.sort((a, b) => ranks[b] - ranks[a] || a - b);
    if (state.order === "best") state.found.sort((a, b) => ranks[a] - ranks[b] || a - b);
    state.page = state.at = 0;
    $("note").textContent = set[state.direction].note;
    $("status").textContent = `${state.found.length.toLocaleString("en")} of ${ranks.length.toLocaleString("en")} queries`;
    show();
  }

  function show() {
    state.page = Math.floor(state.at / PAGE);
    const set = current();
    const first = state.page * PAGE;
    const rows = state.found.slice(first, first + PAGE).map((n, k) => row(set, n, first + k));
    $("list").replaceChildren(...rows);
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
    pick();
  }

  function row(set, n, at) {
    const rank = set[state.direction].rank[n];
    const query = queryAt(set, n);
    const image = state.direction === "t2i" ? imageOf(set, query) : query;
    const words = state.direction === "t2i" ? textOf(set, query) : nameOf(set, image);
    const button = make(
      "button",
      { type: "button", onclick: () => { state.at = at; pick(); } },
      thumbnail(set, image, ""),
      make("span", { className: rank === 1 ? "good" : "bad", textContent: rank.toLocaleString("en") }),
      make("span", { className: "words", textContent: words.slice(0, 160) || "(empty caption)" }),
    );
    button.setAttribute("aria-label", `${rankText(rank)}: ${words.slice(0, 80)}`);
    return make("li", {}, button);
  }

  function pick() {
    const set = current();
    const buttons = [...$("list").querySelectorAll("button")];
    buttons.forEach((button, k) => button.setAttribute("aria-current", String(state.page * PAGE + k === state.at)));
    reveal(buttons[state.at - state.page * PAGE]);
    const n = state.found[state.at];
    if (n === undefined) {
      $("detail").replaceChildren(make("p", { textContent: "No query matches." }));
      return;
    }
    $("detail").replaceChildren(...(state.direction === "t2i" ? textQuery(set, n) : imageQuery(set, n)));
    if (!state.started) return; // the address of an untouched page leads to its top
    clearTimeout(address); // browsers limit how often a page may change its address
    address = setTimeout(() => history.replaceState(null, "", `#${state.set},${state.direction},${numberOf(set, queryAt(set, n))}`), 200);
  }

  // Scrolls the list alone: `scrollIntoView` would also scroll the page, past the results.
  function reveal(button) {
    if (!button) return;
    const list = $("list").getBoundingClientRect();
    const { top, bottom } = button.getBoundingClientRect();
    $("list").scrollTop += Math.min(top - list.top, 0) + Math.max(bottom - list.bottom, 0);
  }

  function cutNote(set, caption) {
    const lost = data.lost[set.texts[caption]];
    return lost > 0 ? [make("p", { className: "faint", textContent: `The tokenizer cuts off its last ${lost} tokens.` })] : [];
  }

  function verdict(rank) {
    return make("p", { className: rank === 1 ? "good" : "bad", textContent: `The right answer has ${rankText(rank)}.` });
  }

  function topOf(set, n, count) {
    const k = Math.min(matches, count);
    const side = set[state.direction];
    return Array.from({ length: k }, (_, m) => [side.top[n * k + m], side.score[n * k + m] / 1000]);
  }

  function textQuery(set, number) {
    const rank = set.t2i.rank[number];
    const query = queryAt(set, number);
    const right = imageOf(set, query);
    const found = topOf(set, number, set.images.length).map(([image, score], n) => {
      const own = captionsOf(set, image);
      return make(
        "li",
        { className: image === right ? "right" : "" },
        thumbnail(set, image, nameOf(set, image)),
        make("div", { textContent: `${n + 1}. score ${score.toFixed(3)}${image === right ? ", right" : ""}` }),
        make("details", {}, make("summary", { textContent: "its caption" }), ...own.map((c) => make("p", { textContent: textOf(set, c) }))),
      );
    });
    return [
      make("h3", { textContent: `Caption ${numberOf(set, query) + 1}` }),
      make("p", { id: "query", textContent: textOf(set, query) }),
      ...cutNote(set, query),
      verdict(rank),
      make("h3", { textContent: "Its image" }),
      thumbnail(set, right, nameOf(set, right)),
      make("p", { className: "faint", textContent: nameOf(set, right) }),
      make("h3", { textContent: "Best candidates" }),
      make("ol", { className: "matches grid" }, ...found),
    ];
  }

  function imageQuery(set, number) {
    const rank = set.i2t.rank[number];
    const query = queryAt(set, number);
    const found = topOf(set, number, set.texts.length).map(([caption, score], n) => {
      const isRight = imageOf(set, caption) === query;
      const other = imageOf(set, caption);
      return make(
        "li",
        { className: isRight ? "right" : "" },
        make("div", { textContent: `${n + 1}. score ${score.toFixed(3)}${isRight ? ", right" : ""}` }),
        make("p", { textContent: textOf(set, caption) }),
        ...(isRight ? [] : [make("details", {}, make("summary", { textContent: "its image" }), thumbnail(set, other, nameOf(set, other)))]),
      );
    });
    return [
      make("h3", { textContent: `Image ${numberOf(set, query) + 1}: ${nameOf(set, query)}` }),
      thumbnail(set, query, nameOf(set, query)),
      verdict(rank),
      make("h3", { textContent: captionsOf(set, query).length > 1 ? "Its captions" : "Its caption" }),
      ...captionsOf(set, query).flatMap((c) => [make("p", { textContent: textOf(set, c) }), ...cutNote(set, c)]),
      make("h3", { textContent: "Best candidates" }),
      make("ol", { className: "matches" }, ...found),
    ];
  }

  function move(at) {
    if (!state.found.length) return;
    state.at = Math.min(Math.max(at, 0), state.found.length - 1);
    if (Math.floor(state.at / PAGE) === state.page) pick();
    else show();
    $("list").querySelector("[aria-current=true]").scrollIntoView({ block: "nearest" }); // keys work anywhere
  }

  function number(text, otherwise) {
    const value = parseFloat(text);
    return Number.isFinite(value) ? value : otherwise;
  }

  function read() {
    state.set = Number($("set").value);
    state.direction = $("direction").value;
    state.low = number($("low").value, 1);
    state.high = number($("high").value, Infinity);
    state.order = $("order").value;
    state.search = $("search").value.trim().toLowerCase();
    find();
  }

  const keys = {
    j: () => move(state.at + 1),
    k: () => move(state.at - 1),
    n: () => move((state.page + 1) * PAGE < state.found.length ? (state.page + 1) * PAGE : state.at),
    p: () => move(Math.max(0, state.page - 1) * PAGE),
    d: () => { $("direction").value = state.direction === "t2i" ? "i2t" : "t2i"; read(); },
    m: () => { $("low").value = state.low > 1 ? 1 : 1.1; read(); },
    "/": () => $("search").focus(),
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select");
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });

  $("set").replaceChildren(...data.sets.map((set, n) => make("option", { value: String(n), textContent: set.title })));
  let waiting;
  $("controls").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(read, event.target.type === "search" ? 150 : 0);
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", keys.p);
  $("next").addEventListener("click", keys.n);
  for (const id of ["controls", "keys", "browser"]) $(id).hidden = false;

  const asked = /^#(\d+),(t2i|i2t),(\d+)$/.exec(location.hash);
  if (asked && data.sets[asked[1]]) {
    $("set").value = asked[1];
    $("direction").value = asked[2];
  }
  read();
  if (asked) {
    const at = state.found.findIndex((n) => numberOf(current(), queryAt(current(), n)) === Number(asked[3]));
    if (at >= 0) { state.at = at; show(); }
    $("browser").scrollIntoView();
  }
  state.started = true;
})().catch((error) => {
  document.getElementById("status").textContent = `The query browser could not start: ${error.message}`;
});
