// The blind test: one picture at a time, a class for each, and the key only at the end. The keyboard
// is read while the focus is in the test, so that it takes no letter from anything else on the page.
const home = document.querySelector(".blind-test");
const stage = home.querySelector(".blind-stage");
const said = home.querySelector(".blind-said");
const made = home.querySelector(".blind-made");
const { picture, key, digest, unsure, repository } = home.dataset;
const [count, columns, width, height] = ["count", "columns", "width", "height"].map((name) =>
  Number(home.dataset[name]),
);
const classes = JSON.parse(home.dataset.classes);
// digits answer for themselves; other classes are numbered as they stand on the keyboard
const keys = classes.map((name, i) => (name.length === 1 ? name : ("1234567890"[i] ?? "")));
const names = {
  "support vector": "Support vectors",
  control: "Controls",
  real: "Real pictures",
};
const sheet = new Image();
let answers = [];

function element(tag, properties = {}, ...children) {
  const { dataset, style, ...rest } = properties;
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  Object.assign(made.dataset, dataset);
  for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

// Enlarged smoothly: the edges of large pixels hide what a small picture shows. First cut out, with its
// edges repeated around it, since smoothing would mix in the neighbours.
function tile(number, side, label) {
  const scale = Math.ceil((side * (globalThis.devicePixelRatio || 1)) / Math.max(width, height));
  const canvas = element("canvas", {
    width: width * scale,
    height: height * scale,
    role: "img",
    "aria-label": label,
  });
  const [x, y] = [(number - 1) % columns, Math.floor((number - 1) / columns)];
  const small = element("canvas", { width: width + 2, height: height + 2 }).getContext("2d");
  for (const down of [0, 2, 1]) {
    for (const right of [0, 2, 1]) {
      small.drawImage(sheet, x * width, y * height, width, height, right, down, width, height);
    }
  }
  const draw = canvas.getContext("2d");
  draw.imageSmoothingQuality = "high";
  draw.drawImage(small.canvas, 1, 1, width, height, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// What goes wrong is shown; what the page shows anyway is only read out.
function tell(text, { wrong = false } = {}) {
  said.textContent = text;
  said.classList.toggle("wrong", wrong);
}

function button(text, act, options = {}) {
  return element("button", { type: "button", onclick: act, ...options }, text);
}

// --- asking ---------------------------------------------------------------------------------------

function welcome() {
  stage.replaceChildren(
    element("p", {}, `Take what comes to mind first: ${count} pictures take about four minutes, and
      you may stop at any. Choose by mouse, finger or keyboard.`),
    button("Begin", begin, { className: "blind-begin" }),
  );
  stage.hidden = false;
}

async function begin() {
  answers = [];
  made.hidden = true;
  sheet.src = picture;
  try {
    await sheet.decode();
  } catch {
    tell(`The pictures could not be read: ${picture} is missing.`, { wrong: true });
    return;
  }
  ask();
}

function ask() {
  const number = answers.length + 1;
  const choices = classes.map((name, i) =>
    button(element("span", {}, name), () => answer(name), {
      "aria-keyshortcuts": keys[i],
      dataset: { key: keys[i] },
    }),
  );
  const back = button("Back", undo, { disabled: !answers.length, "aria-keyshortcuts": "Backspace" });
  const stop = button("Finish here", finish, { disabled: !answers.length });
  stage.replaceChildren(
    element("div", { className: "blind-where" },
      element("p", { className: "blind-count" }, `Picture ${number} of ${count}`),
      element("progress", { max: count, value: answers.length, "aria-label": "answered" }),
    ),
    element("div", { className: "blind-question" },
      tile(number, 256, `picture ${number}, without its label`),
      element("div", {},
        element("p", { className: "blind-prompt", id: "blind-prompt" }, "What does it show?"),
        element("div", { className: "blind-choices", role: "group", "aria-labelledby": "blind-prompt" },
          ...choices,
          button(element("span", {}, "I cannot tell"), () => answer(unsure), {
            className: "blind-unsure",
            "aria-keyshortcuts": "x",
            dataset: { key: "x" },
          }),
        ),
        element("div", { className: "blind-ways" }, back, stop),
      ),
    ),
  );
  tell(`Picture ${number} of ${count}`);
  stage.focus({ preventScroll: true });
  const { top, bottom } = stage.querySelector("canvas").getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) stage.scrollIntoView();
}

function answer(name) {
  answers.push(name);
  if (answers.length === count) finish();
  else ask();
}

function undo() {
  answers.pop();
  ask();
}

home.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !stage.querySelector(".blind-choices")) return;
  if (event.key === "Backspace" && answers.length) undo();
  else {
    const chosen = [...stage.querySelectorAll("[data-key]")].find(
      ({ dataset }) => dataset.key && dataset.key === event.key.toLowerCase(),
    );
    if (!chosen) return;
    chosen.click();
  }
  event.preventDefault();
});

// --- the result -----------------------------------------------------------------------------------

function readKey() {
  return new Promise((resolve, reject) => {
    const script = element("script", { src: key });
    script.onload = () => resolve(globalThis.blindTestKey);
    script.onerror = () => reject(new Error(`${key} is missing`));
    document.head.append(script);
  });
}

// Wilson's 95 % interval of a rate, in %.
function wilson(right, n) {
  const z = 1.959963984540054;
  const rate = right / n;
  const middle = rate + (z * z) / (2 * n);
  const reach = z * Math.sqrt((rate * (1 - rate)) / n + (z * z) / (4 * n * n));
  // at 0 and 1 rounding would leave it just outside
  const ends = [middle - reach, middle + reach].map((v) => (100 * v) / (1 + (z * z) / n));
  return ends.map((v) => Math.min(100, Math.max(0, v)));
}

function percent(value) {
  return `${Math.round(value)} %`;
}

function scored(rows) {
  return Object.keys(names).flatMap((kind) => {
    const part = rows.filter((row) => row.kind === kind);
    if (!part.length) return [];
    const right = part.filter((row) => row.answer === row.asked).length;
    const judge = (100 * part.filter((row) => row.judge === row.asked).length) / part.length;
    const [low, high] = wilson(right, part.length);
    return [{ kind, n: part.length, right, rate: (100 * right) / part.length, low, high, judge }];
  });
}

async function finish() {
  let found;
  try {
    found = await readKey();
  } catch (error) {
    tell(`The key could not be read: ${error.message}. Your answers are kept.`, { wrong: true });
    stage.replaceChildren(sending());
    return;
  }
  if (found.set !== digest) {
    tell("Pictures and key are of different sets: build the site again.", { wrong: true });
    stage.replaceChildren(sending());
    return;
  }
  const rows = found.key
    .filter((row) => answers[row.number - 1] !== undefined)
    .map((row) => ({ ...row, answer: answers[row.number - 1] }));
  const scores = scored(rows);
  const heading = element("h2", { tabIndex: -1 }, "What you read");
  stage.replaceChildren(heading, summary(scores), table(scores), misread(rows), sending());
  made.hidden = false;
  tell("");
  heading.focus();
}

function summary(scores) {
  const ours = scores.find(({ kind }) => kind === "support vector");
  const text = ours
    ? `Of ${ours.n} support vectors you read ${ours.right} as the class that was asked for.`
    : "There was no support vector among the pictures so far.";
  return element("p", { className: "lead" }, text);
}

function table(scores) {
  const chance = 100 / classes.length;
  const head = ["Pictures", "You", "95 % interval", "Judge"].map((text) =>
    element("th", { scope: "col" }, text),
  );
  head.push(element("td", { "aria-hidden": "true", className: "blind-scale" },
    ...[0, 50, 100].map((at) => element("span", { style: { "--at": `${at}%` } }, `${at}`))));
  const body = scores.map((s) => {
    const mark = (name, from, to) =>
      element("span", { className: name, style: { "--from": `${from}%`, "--to": `${to}%` } });
    return element("tr", { dataset: { kind: s.kind } },
      element("th", { scope: "row" }, names[s.kind]),
      element("td", { dataset: { label: "You" } }, `${s.right} of ${s.n} (${percent(s.rate)})`),
      element("td", { dataset: { label: "95 % interval" } }, `${Math.round(s.low)} – ${percent(s.high)}`),
      element("td", { dataset: { label: "Judge" } }, percent(s.judge)),
      element("td", { className: "blind-track", "aria-hidden": "true" },
        element("div", {},
          mark("chance", chance, chance), mark("range", s.low, s.high),
          mark("judge", s.judge, s.judge), mark("you", s.rate, s.rate))),
    );
  });
  return element("div", {},
    element("table", { className: "blind-scores" },
      element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)),
    element("p", { className: "blind-legend" },
      element("span", { className: "you" }), " you, with Wilson's interval · ",
      element("span", { className: "judge" }), " the judge, on the same pictures · ",
      element("span", { className: "chance" }),
      ` chance, ${percent(chance)}. Controls are of a network that knows nothing: there is nothing to
        read in them.`),
  );
}

function misread(rows) {
  const wrong = rows.filter((row) => row.answer !== row.asked && row.kind !== "control");
  if (!wrong.length) return element("p", {}, "You read every picture that shows something.");
  const shown = wrong.map((row) => {
    const yours = row.answer === unsure ? "you could not tell" : `you: ${row.answer}`;
    const judge = row.judge === row.asked ? "" : `, judge: ${row.judge}`;
    return element("li", {},
      tile(row.number, 96, `picture ${row.number}, asked for ${row.asked}`),
      element("p", {}, element("b", {}, row.asked), element("br"), `${yours}${judge}`, element("br"),
        element("small", {}, `${row.kind} · ${row.source}`)),
    );
  });
  return element("div", {},
    element("h3", {}, "Read as something else"),
    element("p", {}, "In bold what was asked for; real pictures show it."),
    element("ul", { className: "blind-misread" }, ...shown),
  );
}

function saved() {
  const given = Object.fromEntries(answers.map((name, i) => [i + 1, name]));
  return JSON.stringify({ set: digest, answers: given });
}

function save() {
  const url = URL.createObjectURL(new Blob([`${saved()}\n`], { type: "application/json" }));
  element("a", { href: url, download: `blind-test-${digest.slice(0, 8)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function sending() {
  const about = new URLSearchParams({ title: "Answers to the blind test", body: saved() });
  const where = repository
    ? element("a", { href: `https://github.com/${repository}/issues/new?${about}` },
        "an issue of the repository")
    : "an issue of the repository from which you have this page";
  return element("div", {},
    element("h3", {}, "Send your answers"),
    element("p", {}, "Put them into ", where, `, or save them as a file and attach it. They are your
      answers and the digest of the set, nothing about you; `,
      element("code", {}, "BlindTest.read_answers"), " reads the file."),
    element("div", { className: "blind-ways" },
      button("Save answers", save, { className: "blind-save" }), button("Once more", begin)),
  );
}

welcome();
