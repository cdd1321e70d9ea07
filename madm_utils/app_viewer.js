// Draws what app_viewer.viewer_value describes. gradio runs this once, with `element`, `props` and `watch`.
const root = element.querySelector(".viewer");
const state = { view: "overlay", opacity: 60, hidden: new Set() };
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis, 0 to 100 %
const DIFFERENCE = [214, 39, 140];
let layers = null; // the decoded pictures of the value on display
let serial = 0; // a slow decoding never replaces a newer value

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children); // text stays text: names of classes and files come from outside
  return node;
}

async function pixels(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

const grey = (data) => Uint8Array.from({ length: data.data.length / 4 }, (_, k) => data.data[4 * k]);
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : (100 * share).toFixed(1) + " %");

function rampTable() {
  return Array.from({ length: 256 }, (_, value) => {
    const place = (value / 255) * (RAMP.length - 1);
    const low = Math.min(Math.floor(place), RAMP.length - 2);
    return RAMP[low].map((from, k) => Math.round(from + (RAMP[low + 1][k] - from) * (place - low)));
  });
}
const HEAT = rampTable();

async function show() {
  const mine = ++serial;
  const value = props.value;
  const message = value && value.message;
  if (!value || message) {
    layers = null;
    root.replaceChildren(message ? make("p", { class: "alert", role: "alert" }, message)
      : make("p", { class: "hint" }, "Choose an image or one of the examples, then press Segment."));
    return;
  }
  const base = await pixels(value.image);
  const results = [];
  for (const result of value.results) {
    const [labels, confidence] = [grey(await pixels(result.labels)), grey(await pixels(result.confidence))];
    results.push({ ...result, labels, confidence });
  }
  if (mine !== serial) return;
  layers = { base, results };
  if (results.length < 2 && state.view === "difference") state.view = "overlay";
  build(value);
  draw();
}

function build(value) {
  const { base, results } = layers;
  const size = `${value.name}: ${value.width} × ${value.height} pixels`;
  const panels = (results.length ? results : [null]).map((result, k) => {
    const width = `width: min(100%, calc(75vh * ${base.width / base.height}))`;
    const canvas = make("canvas", { width: base.width, height: base.height, role: "img", style: width,
      onpointermove: read, onpointerleave: () => read(null) });
    const caption = result
      ? [make("strong", {}, (results.length === 2 ? "AB"[k] + ": " : "") + result.title), make("br"), `${size}, model ${result.seconds.toFixed(2)} s, ` +
          `mean confidence ${percent(result.confidence_mean)}`, make("div", { class: "readout" })]
      : [`${size}. Press Segment to see the classes.`];
    return make("figure", {}, canvas, make("figcaption", {}, ...caption));
  });
  root.replaceChildren(...(results.length ? [controls()] : []), make("div", { class: "panels" }, ...panels));
  if (!results.length) return;
  const stops = RAMP.map((color) => `rgb(${color})`).join(",");
  root.append(make("div", { class: "scale", "aria-label": "Colours of the confidence" }, "0 %",
    make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${stops})` }), "100 % sure"));
  if (value.agreement !== null) {
    root.append(make("p", { class: "agreement" }, `Both give the same class to ${percent(value.agreement)} of the pixels.`));
  }
  root.append(legend());
}

function controls() {
  const views = { overlay: "Classes", confidence: "Confidence", image: "Image only" };
  if (layers.results.length === 2) views.difference = "Differences";
  const radios = Object.entries(views).map(([view, text]) => {
    const radio = make("input", { type: "radio", name: "view-" + serial, value: view,
      onchange: () => { state.view = view; draw(); } });
    radio.checked = view === state.view;
    return make("label", {}, radio, text);
  });
  const output = make("output", {}, state.opacity + " %");
  const slider = make("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": "Opacity", oninput: () => {
    state.opacity = Number(slider.value);
    output.textContent = state.opacity + " %";
    draw();
  } });
  slider.value = state.opacity;
  return make("div", { class: "controls" },
    make("fieldset", { class: "views", "aria-label": "View" }, ...radios),
    make("label", { class: "opacity" }, "Opacity", slider, output));
}

function legend() {
  const names = new Map(); // name -> its class in each result, where it has one
  layers.results.forEach((result, k) => result.classes.forEach((one) => {
    if (!names.has(one.name)) names.set(one.name, []);
    names.get(one.name)[k] = one;
  }));
  const boxes = [];
  const rows = [...names].map(([name, classes]) => {
    const box = make("input", { type: "checkbox", onchange: () => {
      box.checked ? state.hidden.delete(name) : state.hidden.add(name);
      draw();
    } });
    box.checked = !state.hidden.has(name);
    boxes.push(box);
    const present = classes.filter(Boolean);
    const colors = [...new Set(present.map((one) => `rgb(${one.color})`))];
    const shares = layers.results.map((_, k) => (classes[k] ? percent(classes[k].share) : "–")).join(" | ");
    return make("label", {}, box,
      ...colors.map((color) => make("span", { class: "swatch", style: `background: ${color}` })),
      make("span", { class: "name" }, name), make("span", { class: "share" }, shares));
  });
  const all = (shown) => () => {
    state.hidden = new Set(shown ? [] : names.keys());
    boxes.forEach((box) => { box.checked = shown; });
    draw();
  };
  return make("fieldset", { class: layers.results.length === 2 ? "legend two" : "legend" },
    make("legend", {}, "Classes, with their share of the image"),
    make("button", { type: "button", onclick: all(true) }, "Show all"),
    make("button", { type: "button", onclick: all(false) }, "Hide all"),
    make("div", { class: "names" }, ...rows));
}

function draw() {
  root.querySelectorAll("canvas").forEach((canvas, k) => {
    const result = layers.results[k];
    const picture = new ImageData(new Uint8ClampedArray(layers.base.data), layers.base.width, layers.base.height);
    if (result && state.view !== "image") paint(picture.data, result);
    canvas.getContext("2d").putImageData(picture, 0, 0);
    canvas.setAttribute("aria-label", description(result));
  });
  const scale = root.querySelector(".scale");
  if (scale) scale.style.display = state.view === "confidence" ? "" : "none";
}

function paint(data, result) {
  const share = state.opacity / 100;
  const visible = result.classes.map((one) => !state.hidden.has(one.name));
  const other = layers.results.find((one) => one !== result);
  for (let k = 0; k < result.labels.length; k++) {
    const id = result.labels[k];
    if (!visible[id]) continue;
    let color = result.classes[id].color;
    if (state.view === "confidence") color = HEAT[result.confidence[k]];
    if (state.view === "difference") {
      if (result.classes[id].name === other.classes[other.labels[k]].name) continue;
      color = DIFFERENCE;
    }
    for (let c = 0; c < 3; c++) data[4 * k + c] = (1 - share) * data[4 * k + c] + share * color[c];
  }
}

function description(result) {
  if (!result || state.view === "image") return "The image";
  const largest = [...result.classes].sort((a, b) => b.share - a.share).filter((one) => one.share > 0).slice(0, 4);
  const what = { overlay: "Classes", confidence: "Confidence", difference: "Differences" }[state.view];
  return `${what} over the image, ${result.title}: ` + largest.map((one) => `${one.name} ${percent(one.share)}`).join(", ");
}

function read(event) {
  // The place under the pointer, in every panel: what each model says there.
  const box = event && event.target.getBoundingClientRect();
  const column = event && Math.floor(((event.clientX - box.left) / box.width) * layers.base.width);
  const row = event && Math.floor(((event.clientY - box.top) / box.height) * layers.base.height);
  const inside = event && column >= 0 && row >= 0 && column < layers.base.width && row < layers.base.height;
  root.querySelectorAll(".readout").forEach((line, k) => {
    const result = layers.results[k];
    const place = row * layers.base.width + column;
    line.textContent = inside
      ? `Under the pointer: ${result.classes[result.labels[place]].name}, ${percent(result.confidence[place] / 255)} sure` : "";
  });
}

watch("value", show);
show();
