const IGNORED = 255;
const WRONG = [213, 94, 0], CORRECT = [225, 225, 225], UNLABELLED = [0, 0, 0];
const viewer = { group: 0, images: [], place: 0, hidden: new Set(), off: new Set(), lit: null, errors: false, maps: {} };

/** Class ids of a compressed label or prediction. */
async function decompress(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const group = () => data.groups[viewer.group];
const modelsShown = () => data.models.map((model, k) => ({ ...model, k })).filter((m) => m.group === viewer.group);
const currentImage = () => viewer.images[viewer.place];

/** Names in the order of the panes; a pane is known by its place, because models may have any name. */
function paneNames() {
  return ["input", "label", ...modelsShown().map((model) => model.name)];
}

/** RGBA of class ids as classes, or with a label to compare with, as errors. */
function painted(ids, label, width, height) {
  const pixels = new ImageData(width, height);
  const palette = group().palette;
  for (let i = 0; i < ids.length; i++) {
    const of = label ? label[i] : ids[i];
    let colour = UNLABELLED;
    if (label) colour = of === IGNORED ? UNLABELLED : ids[i] === of ? CORRECT : WRONG;
    else if (of !== IGNORED) colour = palette[of];
    const visible = !viewer.off.has(of) && (viewer.lit === null || viewer.lit === of);
    pixels.data.set([...colour, visible ? 255 : 0], 4 * i);
  }
  return pixels;
}

function pane(place, name, colour, iou) {
  const canvas = make("canvas", { class: "colours" });
  const layers = make("div", { class: "layers" }, make("img", { alt: "" }), canvas);
  const frame = make("div", { class: "frame" }, layers, make("span", { class: "mark" }));
  const caption = make("figcaption", {}, make("b", { title: name }, colour ? chip(colour) : null, name),
    iou === undefined ? null : make("span", {}, `IoU ${number(iou)}`));
  frame.addEventListener("pointermove", point);
  frame.addEventListener("pointerleave", () => byId("panes").classList.remove("pointed"));
  frame.addEventListener("click", () => byId("panes").classList.toggle("zoomed"));
  return make("figure", { "data-pane": place }, caption, frame);
}

/** Build the panes of the chosen image; pictures appear when they are decoded. */
async function showImage() {
  const image = currentImage();
  const [height, width] = image.size;
  const panes = [pane(0, "input"), pane(1, "label")];
  for (const model of modelsShown()) {
    panes.push(pane(panes.length, model.name, colourOf(model.k), model.iou[image.index]));
  }
  byId("panes").replaceChildren(...panes);
  for (const element of panes) {
    element.querySelector("img").src = image.input;
    element.querySelector("canvas").width = width;
    element.querySelector("canvas").height = height;
    // The shape is known before anything is decoded.
    element.querySelector("img").style.aspectRatio = `${width} / ${height}`;
  }
  panes[0].querySelector("canvas").remove();
  byId("panes").classList.toggle("coarse", width < 320);
  const texts = [image.label, ...modelsShown().map((model) => model.predictions[image.index])];
  const maps = await Promise.all(texts.map((text) => (text ? decompress(text) : null)));
  if (image !== currentImage()) return;
  viewer.maps = { width, height, label: maps[0], models: maps.slice(1) };
  modelsShown().forEach((model, k) => {
    if (maps[k + 1]) return;
    const note = make("p", { class: "absent" }, "Not kept: among the worst of a later model only.");
    panes[k + 2].querySelector(".frame").replaceChildren(note);
  });
  paint();
  hidePanes();
  byId("image").value = String(viewer.place);
  byId("panes").dataset.image = image.file;
}

function paint() {
  const { width, height, label, models } = viewer.maps;
  const canvases = [...byId("panes").children].slice(1).map((figure) => figure.querySelector("canvas"));
  [label, ...models].forEach((ids, k) => {
    if (!ids) return;
    const against = viewer.errors && k ? label : null;
    canvases[k].getContext("2d").putImageData(painted(ids, against, width, height), 0, 0);
  });
}

function hidePanes() {
  [...byId("panes").children].forEach((figure, place) => { figure.hidden = viewer.hidden.has(place); });
  byId("panes-choice").querySelectorAll("input").forEach((box, place) => { box.checked = !viewer.hidden.has(place); });
}

function togglePane(place) {
  if (!viewer.hidden.delete(place)) viewer.hidden.add(place);
  hidePanes();
}

/** Mark the same pixel in all panes and say what they hold there. */
function point(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  const panes = byId("panes");
  panes.style.setProperty("--x", `${100 * x}%`);
  panes.style.setProperty("--y", `${100 * y}%`);
  // Zooming is about the pointer, so that the pixel under it is the same with and without.
  panes.classList.add("pointed");
  const { width, height, label, models } = viewer.maps;
  if (!label) return;
  const column = Math.min(width - 1, Math.max(0, Math.floor(x * width)));
  const row = Math.min(height - 1, Math.max(0, Math.floor(y * height)));
  const nameOf = (ids) => (ids ? group().classes[ids[row * width + column]] ?? "not labelled" : "–");
  const parts = [`label: ${nameOf(label)}`];
  modelsShown().forEach((model, k) => parts.push(`${model.name}: ${nameOf(models[k])}`));
  byId("readout").textContent = parts.join("   ·   ");
}

/** Fill the list of images with those of a set: all, or the worst of a model. */
function chooseSet(value) {
  const all = group().images;
  const model = value === "all" ? null : data.models[Number(value)];
  viewer.images = model ? model.worst.map((index) => all.find((image) => image.index === index)) : all;
  viewer.place = 0;
  byId("set").value = value;
  byId("image").replaceChildren(...viewer.images.map((image, k) => {
    const iou = model ? `, IoU ${number(model.iou[image.index])}` : "";
    return make("option", { value: k }, image.file + (image.condition ? ` (${image.condition})` : "") + iou);
  }));
  if (viewer.images.length) showImage();
}

function chooseGroup(number) {
  viewer.group = number;
  viewer.hidden.clear();
  viewer.off.clear();
  byId("set").replaceChildren(make("option", { value: "all" }, `all ${group().images.length} images kept`),
    ...modelsShown().filter((model) => model.worst.length)
      .map((model) => make("option", { value: model.k }, `worst of ${model.name}`)));
  byId("panes-choice").replaceChildren("Panes:", ...paneNames().map((name, place) => make("label", {},
    make("input", { type: "checkbox", value: place, change: () => togglePane(place) }), name)));
  byId("legend").replaceChildren(...[...group().classes, "not labelled"].map((name, k) => {
    const id = k < group().classes.length ? k : IGNORED;
    const colour = id === IGNORED ? UNLABELLED : group().palette[id];
    const light = (value) => () => { viewer.lit = value; paint(); };
    const button = make("button", { type: "button", "aria-pressed": "true", mouseenter: light(id),
      mouseleave: light(null), click: () => {
        if (!viewer.off.delete(id)) viewer.off.add(id);
        button.setAttribute("aria-pressed", String(!viewer.off.has(id)));
        paint();
      } }, chip(rgb(colour)), name);
    return button;
  }));
  chooseSet("all");
}

function step(by) {
  const count = viewer.images.length;
  viewer.place = (viewer.place + by + count) % count;
  showImage();
}

function setErrors(value) {
  viewer.errors = value;
  byId("errors").checked = value;
  paint();
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=range]")) return;
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key.toLowerCase() === "e") setErrors(!viewer.errors);
  else if (/^[1-9]$/.test(event.key) && event.key <= paneNames().length) togglePane(event.key - 1);
  else return;
  event.preventDefault();
}

function worstLists() {
  data.models.forEach((model, k) => {
    const thumbs = model.worst.map((index) => {
      const image = data.groups[model.group].images.find((one) => one.index === index);
      const show = () => {
        if (viewer.group !== model.group) { byId("group").value = model.group; chooseGroup(model.group); }
        chooseSet(String(k));
        viewer.place = viewer.images.indexOf(image);
        showImage();
        byId("viewer").scrollIntoView();
      };
      return make("button", { type: "button", click: show, title: image.file },
        make("img", { src: image.input, alt: "" }),
        make("span", {}, `IoU ${number(model.iou[index])}`), make("span", {}, image.file.split("/").pop()));
    });
    byId("worst-lists").append(make("h3", {}, chip(colourOf(k)), model.name), make("div", { class: "thumbs" }, ...thumbs));
  });
}

byId("group").append(...data.groups.map((one, k) => make("option", { value: k }, one.name)));
byId("group-choice").hidden = data.groups.length === 1;
byId("group").addEventListener("change", (event) => chooseGroup(Number(event.target.value)));
byId("set").addEventListener("change", (event) => chooseSet(event.target.value));
byId("image").addEventListener("change", (event) => { viewer.place = Number(event.target.value); showImage(); });
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("errors").addEventListener("change", (event) => setErrors(event.target.checked));
byId("opacity").addEventListener("input", (event) => {
  byId("panes").style.setProperty("--opacity", event.target.value / 100);
});
document.addEventListener("keydown", pressed);
chooseGroup(0);
worstLists();
