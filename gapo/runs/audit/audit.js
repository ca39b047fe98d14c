"use strict";
// The list of an audit's page: search, filters, keys, and marks that stay in the browser until they are saved as a file.
// The page is HTML that stands without this script; nothing here makes markup of text.
(() => {
  const FORMAT = "gapo-marks", VERSION = 1, KEYS = { w: "wrong", r: "right", u: "unsure" };
  const byId = (id) => document.getElementById(id);
  const list = byId("pairs"), bar = byId("bar");
  const { digest } = list.dataset, key = `${FORMAT}:${digest}`;
  const cards = [...list.children];
  const texts = new Map(); // card -> what a search looks through
  let marks = new Map(); // row -> {row, line, id, mark}; mark null: taken back, also where the page came with one
  let current = null;

  // Marks, and where they stay

  const entryOf = (card, mark) => ({
    row: Number(card.dataset.row), line: JSON.parse(card.dataset.line), id: JSON.parse(card.dataset.id), mark,
  });
  const cardOf = new Map(cards.map((card) => [Number(card.dataset.row), card]));
  const own = cards.filter((card) => card.dataset.mark).map((card) => entryOf(card, card.dataset.mark));

  function read(content) { // the entries of a file or of the browser's own copy; throws what is wrong with it
    if (content === null || typeof content !== "object" || content.format !== FORMAT) {
      throw new Error("it is no marks.json of an audit's page");
    }
    if (content.version !== VERSION) throw new Error(`it is of version ${content.version}, and this page reads ${VERSION}`);
    if (content.pairs_digest !== digest) throw new Error("it marks other pairs than this page's");
    const rows = Number(list.dataset.pairs);
    const entries = Array.isArray(content.marks) ? content.marks : [];
    for (const entry of entries) {
      const place = Number.isInteger(entry?.row) && entry.row >= 0 && entry.row < rows;
      if (!place || !(entry.mark === null || Object.values(KEYS).includes(entry.mark))) {
        throw new Error(`it has an entry that is no mark: ${JSON.stringify(entry)?.slice(0, 80)}`);
      }
    }
    return entries;
  }

  const fileOf = (entries) => ({ format: FORMAT, version: VERSION, pairs_digest: digest, marks: entries });
  const sorted = () => [...marks.values()].sort((a, b) => a.row - b.row);
  const marked = () => sorted().filter((entry) => entry.mark !== null);

  function recall() { // the page's own marks, and above them the browser's
    marks = new Map(own.map((entry) => [entry.row, entry]));
    let kept = null;
    try {
      kept = localStorage.getItem(key);
    } catch {
      fail("This browser keeps no marks: save them as a file before you leave.");
    }
    if (kept === null) return;
    try {
      for (const entry of read(JSON.parse(kept))) marks.set(entry.row, entry);
    } catch (error) {
      fail(`The marks that this browser kept cannot be read: ${error.message}.`);
    }
  }

  function keep() {
    try {
      localStorage.setItem(key, JSON.stringify(fileOf(sorted())));
    } catch {
      fail("This browser keeps no marks: save them as a file before you leave.");
    }
  }

  function show(card) {
    const mark = marks.get(Number(card.dataset.row))?.mark ?? null;
    if (mark === null) delete card.dataset.mark; else card.dataset.mark = mark;
    card.querySelector(".marked").textContent = mark ?? "";
    for (const button of card.querySelectorAll("button[data-mark]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
    }
  }

  function mark(card, value) { // the same mark again takes it back
    const before = marks.get(Number(card.dataset.row))?.mark ?? null;
    const entry = entryOf(card, before === value ? null : value);
    marks.set(entry.row, entry);
    fail("");
    keep();
    show(card);
    count();
    say(`${card.querySelector(".place").textContent}: ${entry.mark ?? "mark taken back"}.`);
  }

  // What is said

  const counted = (number) => `${number} ${number === 1 ? "mark" : "marks"}`;
  function say(text) { byId("said").textContent = text; }
  function fail(text) { byId("wrong").textContent = text; measure(); }
  function count() {
    const visible = cards.filter((card) => !card.hidden).length, done = marked();
    const parts = Object.values(KEYS).map((name) => `${done.filter((entry) => entry.mark === name).length} ${name}`);
    byId("count").textContent = `${visible} of ${cards.length} pairs shown; ${done.length} marked: ${parts.join(", ")}.`;
    byId("save").disabled = byId("forget").disabled = done.length === 0;
  }
  function measure() { document.documentElement.style.setProperty("--bar-height", `${bar.offsetHeight}px`); }

  // Search and filters

  const folded = (text) => text.normalize("NFC").toLowerCase();
  function textOf(card) {
    if (!texts.has(card)) {
      texts.set(card, folded([...card.querySelectorAll(".place, .text")].map((part) => part.textContent).join("\n")));
    }
    return texts.get(card);
  }

  function filter() {
    const wanted = folded(byId("search").value.trim()), least = Number(byId("least").value) / 100 - 1e-9;
    const byMark = byId("by-mark").value, byFlip = byId("by-flip")?.value ?? "";
    for (const card of cards) {
      const own = card.dataset.mark ?? "none";
      card.hidden = !(
        Number(card.dataset.p) >= least
        && (byMark === "" || byMark === own || (byMark === "any" && own !== "none"))
        && (byFlip === "" || byFlip === card.dataset.flipped)
        && (wanted === "" || textOf(card).includes(wanted))
      );
    }
    count();
  }

  // Keys

  function go(to) {
    if (!to) return;
    current?.removeAttribute("aria-current");
    current = to;
    current.setAttribute("aria-current", "true");
    current.focus({ preventScroll: true });
    current.scrollIntoView({ block: "start" });
  }
  function neighbour(step) { // the next card that is shown, from the current one on
    let place = current ? cards.indexOf(current) + step : step > 0 ? 0 : -1;
    while (cards[place]?.hidden) place += step;
    return cards[place];
  }
  function unfold(card) {
    const button = card.querySelector(".unfold");
    if (!button) return;
    const open = card.classList.toggle("unfolded");
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "fold" : "unfold";
  }

  document.addEventListener("keydown", (event) => {
    const { target } = event, name = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
    if (name === "escape" && target.id === "search") { target.blur(); return; }
    if (target.matches("input:not([type=checkbox]), select, textarea") || target.isContentEditable) return;
    if (name === "j" || name === "k") go(neighbour(name === "j" ? 1 : -1));
    else if (name === "/") byId("search").focus();
    else if (name === "x" && current) unfold(current);
    else if (KEYS[name] && (!current || current.hidden)) say("No pair is chosen: press j, or click one.");
    else if (KEYS[name]) {
      mark(current, KEYS[name]);
      if (byId("onward").checked && current.dataset.mark) go(neighbour(1));
    } else return;
    event.preventDefault();
  });

  list.addEventListener("click", (event) => {
    const card = event.target.closest(".pair"), button = event.target.closest("button");
    if (!card) return;
    if (card !== current) { current?.removeAttribute("aria-current"); current = card; card.setAttribute("aria-current", "true"); }
    if (button?.dataset.mark) mark(card, button.dataset.mark);
    else if (button) unfold(card);
  });
  list.addEventListener("focusin", (event) => { // a card that is tabbed into becomes the current one
    const card = event.target.closest(".pair");
    if (!card || card === current) return;
    current?.removeAttribute("aria-current");
    current = card;
    card.setAttribute("aria-current", "true");
  });

  // Files

  byId("save").addEventListener("click", () => {
    const text = `${JSON.stringify(fileOf(marked()), null, 1)}\n`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "marks.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`${counted(marked().length)} saved as marks.json.`);
  });
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      const entries = read(JSON.parse(await file.text())).filter((entry) => entry.mark !== null);
      for (const entry of entries) marks.set(entry.row, entry);
      fail("");
      keep();
      cards.forEach(show);
      filter();
      say(`${counted(entries.length)} loaded from ${file.name}.`);
    } catch (error) {
      say("");
      fail(`${file.name} was not loaded: ${error.message}.`);
    }
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("forget").addEventListener("click", () => {
    if (!window.confirm(`Forget ${counted(marked().length)}?`)) return;
    marks = new Map([...own, ...marks.values()].map((entry) => [entry.row, { ...entry, mark: null }]));
    keep();
    cards.forEach(show);
    filter();
    say("All marks are forgotten.");
  });
  window.addEventListener("storage", (event) => { // another window on the same pairs
    if (event.key !== key) return;
    recall();
    cards.forEach(show);
    count();
  });

  for (const id of ["search", "least", "by-mark", "by-flip"]) byId(id)?.addEventListener("input", filter);
  window.addEventListener("resize", measure);
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  recall();
  cards.forEach(show);
  filter();
  measure();
})();
