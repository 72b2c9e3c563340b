// Keys, copying, pausing, ages, and which part wakes when. All else is links and forms; nothing here changes a task.
(() => {
  "use strict";
  const root = document.documentElement;
  const base = document.body.dataset.base;
  const find = (selector, where = document) => where.querySelector(selector);
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];

  // -- the cookie that the server renders into <html>

  const remember = () => {
    const secure = location.protocol === "https:" ? ";Secure" : "";
    document.cookie = `taskflow_view=${root.dataset.theme}-${root.dataset.keys};Path=${base};Max-Age=31536000;SameSite=Lax${secure}`;
  };
  const THEMES = ["auto", "light", "dark"];
  const nextTheme = () => {
    root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % 3];
    find("#theme button").title = `Change theme (t), now ${root.dataset.theme}`;
    say(`Theme: ${root.dataset.theme}`);
    remember();
  };

  // -- live

  const stream = find("#stream");
  const live = find("#live");
  const pause = find("#pause");
  let paused = false;
  const show = (state) => {
    live.dataset.state = paused ? "paused" : state;
    find("#live-word").textContent = paused ? "paused" : state;
  };
  const togglePause = () => {
    if (!stream) return;
    paused = !paused;
    pause.setAttribute("aria-pressed", paused);
    find(".word", pause).textContent = paused ? "Resume" : "Pause";
    show("live");
    if (paused) return;
    find("[data-task]")?.dispatchEvent(new Event("wake"));
    stream.dispatchEvent(new CustomEvent("tasks", { detail: {} }));
  };
  // A part does not refresh itself while a person types or ticks in it.
  const busy = (part) => paused || document.hidden || find("input:focus, summary:focus, :checked, .drop[open]", part);
  document.addEventListener("htmx:before:request", (event) => {
    const part = event.target;
    if (part.matches?.("[data-live]") && busy(part)) event.preventDefault();
  });
  if (stream) {
    live.hidden = pause.hidden = false;
    show("connecting");
    stream.addEventListener("htmx:sse:after:connection", () => show("live"));
    stream.addEventListener("htmx:sse:error", () => show("offline"));
    stream.addEventListener("htmx:sse:close", () => show("offline"));
    stream.addEventListener("tasks", (event) => {
      const part = find("[data-task]");
      if (!part || !event.detail?.data) return;
      const news = JSON.parse(event.detail.data);
      if (news.more || news.ids.includes(part.dataset.task)) part.dispatchEvent(new Event("wake"));
    });
  }

  // -- said aloud: the summary, at most every ten seconds

  const spoken = find("#spoken");
  const say = (text) => spoken.textContent = text;
  let summary = find("#summary")?.innerText;
  setInterval(() => {
    const now = find("#summary")?.innerText;
    if (now && now !== summary) say(summary = now);
  }, 10000);

  // -- ages, as views.py

  const age = (seconds) => {
    for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60]]) {
      if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
    }
    return seconds >= 5 ? `${seconds} s ago` : "just now";
  };
  const skew = () => all("time.ago").forEach((time) => {
    const text = age(Math.max(0, Math.floor((Date.now() - Date.parse(time.dateTime)) / 1000)));
    if (time.textContent !== text) time.textContent = text;
  });
  setInterval(() => { if (!document.hidden) skew(); }, 5000);

  // -- copying

  const copy = (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea"); // on plain http
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };
  const idOf = (button) => button.closest("tr")?.id.slice(2) || find("code", button.parentElement).textContent;
  const copyId = async (button) => {
    await copy(idOf(button));
    button.classList.add("done");
    say("Copied");
    setTimeout(() => button.classList.remove("done"), 1500);
  };
  const reveal = () => all(".copy[hidden]").forEach((button) => { button.hidden = false; });
  reveal();
  document.addEventListener("htmx:after:swap", reveal);

  // -- rows

  const rows = () => all(".tasks tbody tr");
  let at = "";
  const mark = () => rows().forEach((row) => row.classList.toggle("at", row.id === at));
  const step = (by) => {
    const list = rows();
    const place = list.findIndex((row) => row.id === at);
    const row = list[place < 0 ? 0 : Math.min(list.length - 1, Math.max(0, place + by))];
    if (!row) return;
    at = row.id;
    mark();
    find("a", row).focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("htmx:after:swap", mark);
  let ticked;
  const tick = (box, whole) => {
    const boxes = all("[name=id]");
    const [from, to] = [boxes.indexOf(ticked), boxes.indexOf(box)].sort((a, b) => a - b);
    if (whole && from >= 0) boxes.slice(from, to).forEach((other) => other.checked = box.checked);
    ticked = box;
  };

  document.addEventListener("click", (event) => {
    const target = event.target;
    const button = target.closest("button");
    if (button?.matches(".copy")) copyId(button);
    else if (button?.id === "pause") togglePause();
    else if (button?.id === "help") find("#keys").showModal();
    else if (button?.id === "keys-switch") switchKeys(button);
    else if (button?.closest("#theme")) { event.preventDefault(); nextTheme(); }
    else if (target.matches("[name=id]")) tick(target, event.shiftKey);
    else if (!target.closest("a, button, summary, form details") && !String(getSelection())) find("a", target.closest(".tasks tbody tr") || spoken)?.click();
  });

  // -- keys: none changes data

  const switchKeys = (button) => {
    const was = root.dataset.keys;
    root.dataset.keys = was === "on" ? "off" : "on";
    button.textContent = `Switch single keys ${was}`;
    remember();
  };
  find("#help")?.removeAttribute("hidden");
  const KEYS = {
    "/": () => find("#q") ? find("#q").focus() : location.assign(`${base}/dashboard/tasks`),
    j: () => step(1),
    k: () => step(-1),
    x: () => find(`[id="${at}"] [type=checkbox]`)?.click(),
    p: togglePause,
    t: nextTheme,
    "?": () => find("#keys")?.showModal(),
  };
  let went = 0;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || root.dataset.keys === "off") return;
    if (event.target.matches("input:not([type=checkbox]), textarea, select") || find("dialog[open]")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const page = Date.now() - went < 1500 && all("[data-key]").find((link) => link.dataset.key === event.key);
    went = event.key === "g" ? Date.now() : 0;
    if (page) page.click();
    else if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
  });
})();
