// What the pages do: theme, formulas, search, folding. Plain JavaScript, nothing from elsewhere.
"use strict";
(() => {
  const root = document.querySelector('meta[name="course-root"]').content;
  const page = document.documentElement;
  const make = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html.trim();
    return template.content.firstElementChild;
  };
  const remember = (value) => { try { localStorage.setItem("course-theme", value); } catch { /* private */ } };

  // ---- light and dark: the script in the head has chosen before the first paint
  const dark = () => page.dataset.bsTheme === "dark";
  const name = (button) => button.setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme");
  const setTheme = (theme) => {
    page.dataset.bsTheme = theme;
    page.classList.toggle("quarto-dark", theme === "dark");
    document.dispatchEvent(new CustomEvent("course-theme", { detail: theme }));
  };
  const theme = document.querySelector(".theme-switch");
  if (theme) {
    name(theme);
    theme.addEventListener("click", () => {
      setTheme(dark() ? "light" : "dark");
      remember(page.dataset.bsTheme);
      name(theme);
    });
  }

  // ---- formulas
  if (window.katex) {
    for (const span of document.querySelectorAll("span.math")) {
      const displayMode = span.classList.contains("display");
      window.katex.render(span.textContent, span, { displayMode, throwOnError: false });
    }
  }

  // ---- what scrolls sideways can be scrolled by keyboard
  const scrollers = document.querySelectorAll("main pre, .table-scroll, .cell-output-display, .math.display");
  const mark = () => {
    for (const box of scrollers) {
      if (box.scrollWidth > box.clientWidth + 1) {
        box.tabIndex = 0;
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", box.dataset.label || "Scrolls sideways");
      } else if (box.getAttribute("role") === "region") {
        box.removeAttribute("tabindex");
        box.removeAttribute("role");
        box.removeAttribute("aria-label");
      }
    }
  };
  mark();
  addEventListener("resize", mark);
  addEventListener("load", mark);

  // ---- boxes that open, such as solutions, also by keyboard
  for (const head of document.querySelectorAll('.callout-header[role="button"]')) {
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.click(); }
    });
  }

  // ---- all code at once
  const fold = document.querySelector(".fold-code");
  if (fold) {
    const cells = document.querySelectorAll("details.code-fold");
    fold.addEventListener("click", () => {
      const open = fold.getAttribute("aria-pressed") === "true";
      cells.forEach((cell) => { cell.open = open; });
      fold.setAttribute("aria-pressed", String(!open));
      mark();
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((box) => { box.open = true; }));

  // ---- the glossary: a field that leaves only the terms that hold what is typed, tones and accents aside
  const terms = [...document.querySelectorAll('main li > strong[id^="term-"]')].map((name) => name.parentElement);
  if (terms.length) {
    const plain = (text) => text.normalize("NFD").replace(/[\p{M}\s]/gu, "").toLowerCase();
    const texts = terms.map((entry) => plain(entry.textContent));
    const letters = [...new Set(terms.map((entry) => entry.closest("section")))];
    const box = make(`<div class="filter" role="search" aria-label="Filter the glossary"><label for="term-filter">Only terms with</label>
      <input type="search" id="term-filter" autocomplete="off" placeholder="English, 中文 or pinyin"><p role="status"></p></div>`);
    const [field, said] = [box.querySelector("input"), box.querySelector("p")];
    const filter = () => {
      const wanted = plain(field.value);
      terms.forEach((entry, at) => { entry.hidden = !texts[at].includes(wanted); });
      const shown = terms.filter((entry) => !entry.hidden);
      for (const letter of letters) letter.hidden = !shown.some((entry) => letter.contains(entry));
      said.textContent = wanted ? `${shown.length} of ${terms.length} terms` : `${terms.length} terms`;
    };
    field.addEventListener("input", filter);
    field.addEventListener("keydown", (event) => {
      const first = terms.find((entry) => !entry.hidden);
      if (event.key === "Escape") { field.value = ""; filter(); }
      if (event.key === "Enter" && first) { event.preventDefault(); first.querySelector("a").focus(); }
    });
    addEventListener("hashchange", () => { // a link to a term that is hidden shows all of them
      const aim = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (aim && aim.closest("[hidden]")) { field.value = ""; filter(); aim.scrollIntoView(); }
    });
    letters[0].before(box);
    filter();
  }

  // ---- search: the index is a script, so it loads from a file as well as from a server
  const dialog = make(`<dialog class="search" aria-label="Search the course">
    <form method="dialog" role="search"><input type="search" aria-label="Search for" placeholder="Search for a word or a name"
      autocomplete="off"><button type="submit" value="close">Close</button></form>
    <p role="status" class="count"></p><ol></ol></dialog>`);
  document.body.append(dialog);
  const input = dialog.querySelector("input"), list = dialog.querySelector("ol"), count = dialog.querySelector(".count");
  const loaded = () => new Promise((resolve, reject) => {
    if (window.courseIndex) return resolve();
    const script = document.createElement("script");
    script.src = `${root}search-index.js`;
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
  const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const excerpt = (text, words) => {
    const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 50);
    const shown = escape((at ? "…" : "") + text.slice(at, at + 170) + (text.length > at + 170 ? "…" : ""));
    const any = words.map((w) => escape(w).replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    return shown.replace(new RegExp(any, "gi"), (hit) => `<mark>${hit}</mark>`);
  };
  const score = ([href, title, section, text], words) => {
    const head = `${title} ${section}`.toLowerCase(), body = text.toLowerCase();
    let sum = 0;
    for (const word of words) {
      const inHead = head.includes(word), inBody = body.includes(word);
      if (!inHead && !inBody) return 0;
      sum += (section.toLowerCase() === word ? 20 : 0) + (inHead ? 5 : 0) + (inBody ? 1 : 0);
      sum += section.toLowerCase() === word && href.startsWith("reference/") ? 1 : 0;
    }
    return sum;
  };
  const search = async () => {
    const wanted = input.value, words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
    await loaded();
    if (wanted !== input.value) return; // more has been typed
    const hits = words.length ? window.courseIndex.map((entry) => [score(entry, words), entry]).filter(([s]) => s) : [];
    hits.sort((a, b) => b[0] - a[0]);
    count.textContent = !words.length ? "" : hits.length ? `${hits.length} places` : "Nothing found";
    list.replaceChildren(...hits.slice(0, 30).map(([, [href, title, section, text]]) => make(`<li><a href="${root}${href}">
      ${escape(section || title)}<span>${escape(title)}</span><span>${excerpt(text, words)}</span></a></li>`)));
    dialog.dataset.searched = wanted;
  };
  const open = () => { dialog.showModal(); input.select(); loaded(); };
  input.addEventListener("input", search);
  input.addEventListener("keydown", (event) => {
    const first = list.querySelector("a");
    if (event.key === "Enter") { event.preventDefault(); if (first) first.click(); }
    if (event.key === "Escape") { event.preventDefault(); dialog.close(); } // not only empty the field
    if (event.key === "ArrowDown" && first) { event.preventDefault(); first.focus(); }
  });
  list.addEventListener("keydown", (event) => {
    const links = [...list.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); (links[at + step] || input).focus(); }
  });
  list.addEventListener("click", (event) => { if (event.target.closest("a")) dialog.close(); });
  const button = document.querySelector(".open-search");
  if (button) button.addEventListener("click", open);
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (!dialog.open && ((event.key === "/" && !typing) || ((event.ctrlKey || event.metaKey) && event.key === "k"))) {
      event.preventDefault();
      open();
    }
  });
})();
