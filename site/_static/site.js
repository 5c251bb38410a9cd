// A button beside each command that copies it. Everything else on the site works without scripts.
for (const code of document.querySelectorAll("code.command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.setAttribute("aria-label", `copy the command ${code.textContent}`);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  code.after(" ", button);
}

// An animation is moved through by its slider: the frames lie beside it, the last one is shown first.
for (const slider of document.querySelectorAll(".scrubber input")) {
  const frames = slider.dataset.frames.split(" ");
  const words = JSON.parse(slider.dataset.words);
  const image = slider.closest(".scrubber").querySelector("img");
  const show = () => {
    image.src = frames[slider.value];
    slider.nextElementSibling.textContent = words[slider.value];
    slider.setAttribute("aria-valuetext", words[slider.value]);
  };
  const fetchAll = () => frames.forEach((address) => (new Image().src = address));
  slider.addEventListener("pointerenter", fetchAll, { once: true });
  slider.addEventListener("focus", fetchAll, { once: true });
  slider.addEventListener("input", show);
}

// A picture opens over the page, at the size of the window; Escape or a click closes it.
const box = document.createElement("dialog");
box.className = "lightbox";
box.setAttribute("aria-label", "A picture, enlarged");
box.addEventListener("click", () => box.close());
box.addEventListener("close", () => box.replaceChildren());
document.addEventListener("keydown", (event) => event.key === "Escape" && box.open && box.close());
document.body.append(box);
const enlarge = (address, alt) => {
  box.replaceChildren(Object.assign(document.createElement("img"), { src: address, alt }));
  box.showModal();
};
for (const link of document.querySelectorAll(".card a.picture, .cell_output a:has(> img)")) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    enlarge(link.href, link.firstElementChild.alt);
  });
}
for (const image of document.querySelectorAll(".cell_output :not(a) > img")) {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => enlarge(image.src, image.alt));
  image.addEventListener("keydown", (event) => event.key === "Enter" && enlarge(image.src, image.alt));
}

// The first time that a page uses a word of the glossary, the word leads there and says what it is.
const siteRoot = document.documentElement.dataset.content_root ?? "./";
if (globalThis.glossary && !location.pathname.endsWith("/glossary.html")) {
  const left = new Map(Object.keys(globalThis.glossary).map((word) => [word.toLowerCase(), word]));
  const escaped = [...left.keys()].map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  escaped.sort((a, b) => b.length - a.length);
  const known = new RegExp(`(?<![\\w-])(${escaped.join("|")})s?(?![\\w-])`, "i");
  for (const part of document.querySelectorAll("article :is(p, li):not(.card *, .ledger *, nav *)")) {
    for (const node of [...part.childNodes]) {
      const found = node.nodeType === Node.TEXT_NODE && known.exec(node.data);
      const word = found && left.get(found[1].toLowerCase());
      if (!word || (word === word.toUpperCase() && found[1] !== word)) continue; // DC is no "dc"
      left.delete(found[1].toLowerCase());
      const link = document.createElement("a");
      link.className = "term";
      link.href = `${siteRoot}glossary.html#term-${word.replaceAll(" ", "-")}`;
      link.title = globalThis.glossary[word];
      const rest = node.splitText(found.index);
      rest.splitText(found[0].length);
      link.textContent = rest.data;
      rest.replaceWith(link);
    }
  }
}
