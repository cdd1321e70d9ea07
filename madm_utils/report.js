"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.comparison.models;
const several = data.models.length > 1;
// Told apart without colour vision too (Okabe and Ito); more than eight models begin again.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900", "#7f7f7f"];
const colourOf = (model) => COLOURS[model % COLOURS.length];
const byId = (id) => document.getElementById(id);
const number = (value, sign = "") =>
  value === null || value === undefined ? "–" : (value > 0 ? sign : "") + value.toFixed(2);

/** An element with attributes; functions become listeners, further arguments its content. */
function make(tag, attributes = {}, ...content) {
  const svg = ["svg", "line", "rect", "circle", "text", "path", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...content.filter((part) => part !== null && part !== undefined));
  return element;
}

function chip(colour) {
  const element = make("span", { class: "chip", "aria-hidden": "true" });
  element.style.background = colour;
  return element;
}

const rgb = (colour) => `rgb(${colour.join(",")})`;

/**
 * A table whose columns sort when their heads are clicked, numbers from high to low first.
 * Columns: {name, text, chip}; cells: {value, show, class}, value a number, a text or null.
 */
function sortableTable(columns, cells) {
  const body = make("tbody");
  const lines = cells.map((line) => {
    const row = make("tr");
    line.forEach((cell, k) => {
      const classes = [columns[k].text ? "text" : "", cell.class || ""].join(" ").trim();
      row.append(make("td", { class: classes || null }, cell.show ?? String(cell.value)));
    });
    return { line, row };
  });
  body.append(...lines.map(({ row }) => row));
  const heads = columns.map((column, k) => {
    const head = make("th", { scope: "col", class: column.text ? "text" : null });
    const sort = () => {
      const first = column.text ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first
        ? { ascending: "descending", descending: "ascending" }[first] : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
      const sorted = [...lines].sort((a, b) => {
        const [left, right] = [a.line[k].value, b.line[k].value];
        // What is not defined stays at the end in both orders.
        if (left === null || right === null) return (left === null) - (right === null);
        return sign * compare(left, right);
      });
      body.append(...sorted.map(({ row }) => row));
    };
    head.append(make("button", { type: "button", click: sort }, column.chip ? chip(column.chip) : null, column.name));
    return head;
  });
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
}

function barCell(value, colour) {
  if (value === null || value === undefined) return { value: null, show: make("span", {}, "–"), class: "bar" };
  const bar = make("i");
  bar.style.setProperty("--share", value / 100);
  bar.style.background = colour;
  return { value, show: make("span", {}, bar, number(value)), class: "bar" };
}

/** A score with its interval, the interval drawn on the axis that all models share. */
function whisker(value, bounds, axis, colour) {
  const [low, high] = axis;
  const x = (score) => 4 + (112 * (score - low)) / (high - low || 1);
  return make("svg", { class: "whisker", width: 120, height: 14, "aria-hidden": "true" },
    make("line", { x1: 0, x2: 120, y1: 7, y2: 7, stroke: "var(--line)" }),
    make("line", { x1: x(bounds[0]), x2: x(bounds[1]), y1: 7, y2: 7, stroke: colour, "stroke-width": 3 }),
    make("circle", { cx: x(value), cy: 7, r: 4.5, fill: colour }));
}

function scoreTable() {
  const keys = Object.keys(data.columns).slice(1);
  const columns = [{ name: "model", text: true }, { name: "mIoU" }];
  if (several) columns.push({ name: `mIoU − ${rows[0].name}` });
  const chosen = data.comparison.chosen_classes;
  const ofChosen = `mIoU of ${chosen.length} classes`;
  if (chosen.length) columns.push({ name: ofChosen });
  if (chosen.length && several) columns.push({ name: `${ofChosen} − ${rows[0].name}` });
  columns.push(...keys.map((key) => ({ name: data.columns[key] })), { name: "images" }, { name: "task", text: true });
  const bounds = rows.map((row) => row.confidence_intervals.miou).filter(Boolean).flat();
  const axis = [Math.min(...bounds), Math.max(...bounds)];
  const best = (key) => {
    if (!several || data.groups.length > 1) return null;
    const values = rows.map((row) => row[key]).filter((value) => value !== null);
    return key === "ece" ? Math.min(...values) : Math.max(...values);
  };
  const cells = rows.map((row, k) => {
    const interval = row.confidence_intervals.miou;
    const range = (limits, sign) => make("span", { class: "range" },
      limits ? ` [${number(limits[0], sign)}, ${number(limits[1], sign)}]` : "");
    const mark = (key) => (row[key] !== null && row[key] === best(key) ? "best" : "");
    const line = [
      { value: row.name, show: make("span", {}, chip(colourOf(k)), row.name) },
      { value: row.miou, class: mark("miou"), show: make("span", {}, number(row.miou), range(interval),
        interval ? whisker(row.miou, interval, axis, colourOf(k)) : null) },
    ];
    const difference = (paired) => (paired
      ? { value: paired.difference, show: make("span", {}, number(paired.difference, "+"), range(paired.interval, "+")) }
      : { value: null, show: k ? "–" : "" });
    if (several) line.push(difference(row.difference));
    if (chosen.length) {
      line.push({ value: row.classes_miou,
        show: make("span", {}, number(row.classes_miou), range(row.classes_interval)) });
      if (several) line.push(difference(row.classes_difference));
    }
    line.push(...keys.map((key) => ({ value: row[key], show: number(row[key]), class: mark(key) })));
    line.push({ value: row.num_images }, { value: row.task });
    return line;
  });
  byId("score-table").append(sortableTable(columns, cells));
  byId("notes").append(...data.notes.map((line) => make("p", {}, line)));
}

const modelColumns = () => rows.map((row, k) => ({ name: row.name, chip: colourOf(k) }));

function classTable() {
  const colours = {};
  for (const group of data.groups) {
    group.classes.forEach((name, k) => { colours[name] ??= rgb(group.palette[k]); });
  }
  const single = several ? null : data.models[0];
  const columns = [{ name: "class", text: true }, ...modelColumns()];
  if (single) columns.splice(1, 1, { name: "IoU" }, { name: "boundary IoU" }, { name: "accuracy" });
  // By the list, because an object puts names that are numbers first.
  const cells = data.comparison.classes.map((name) => {
    const ious = data.comparison.per_class[name];
    const line = [{ value: name, show: make("span", {}, chip(colours[name]), name) }];
    line.push(...rows.map((row, k) => barCell(ious[row.name], colourOf(k))));
    if (single) line.push(barCell(single.boundary[name], COLOURS[1]), barCell(single.accuracy[name], COLOURS[2]));
    return line;
  });
  byId("class-table").append(sortableTable(columns, cells));
}

function conditionTables() {
  const tables = data.comparison.conditions;
  if (!tables.length) { byId("conditions").remove(); byId("to-conditions").remove(); }
  for (const table of tables) {
    const columns = [{ name: table.column, text: true }, { name: "images" }, ...modelColumns()];
    const cells = table.names.map((name) => [
      { value: name }, { value: table.groups[name].num_images },
      ...rows.map((row, k) => barCell(table.groups[name].miou[row.name] ?? null, colourOf(k))),
    ]);
    byId("condition-tables").append(make("p", { class: "hint" }, `mIoU, ${table.dataset} split`),
      make("div", { class: "scroll" }, sortableTable(columns, cells)));
  }
}

function confusionTable(model) {
  const { confusion, classes } = data.models[model];
  const totals = classes.map((_, k) => confusion.reduce((sum, line) => sum + line[k], 0));
  const head = make("tr", {}, make("th"), ...classes.map((name) => make("th", { scope: "col" }, make("div", {}, name))));
  const body = confusion.map((line, row) => make("tr", {}, make("th", { scope: "row" }, classes[row]),
    ...line.map((count, column) => {
      if (!totals[column]) return make("td", { class: "empty", title: `${classes[column]}: not labelled` });
      const share = count / totals[column];
      const cell = make("td", { class: share > 0.55 ? "strong" : null,
        title: `${(100 * share).toFixed(2)} % of ${classes[column]} is predicted as ${classes[row]} (${count} pixels)` },
        share >= 0.005 ? (100 * share).toFixed(0) : "");
      cell.style.setProperty("--share", Math.sqrt(share).toFixed(3));
      return cell;
    })));
  byId("confusion-table").replaceChildren(
    make("table", { class: "heat" }, make("thead", {}, head), make("tbody", {}, ...body)));
}

function reliability(model, k) {
  const { bins, ece } = model.calibration;
  const [left, top, side, strip] = [40, 10, 240, 40];
  const total = bins.reduce((sum, bin) => sum + bin.pixels, 0) || 1;
  const svg = make("svg", { width: 300, height: 350, viewBox: "0 0 300 350", role: "img",
    "aria-label": `Reliability of ${model.name}: expected calibration error ${number(ece)} percent` });
  const x = (value) => left + side * value;
  const y = (percent) => top + side * (1 - percent / 100);
  for (const bin of bins) {
    const width = side * (bin.to - bin.from) - 1.5;
    if (bin.pixels) {
      svg.append(make("rect", { x: x(bin.from), y: y(bin.accuracy), width, height: (side * bin.accuracy) / 100,
        fill: colourOf(k) }));
      svg.append(make("circle", { cx: x(bin.confidence / 100), cy: y(bin.accuracy), r: 2.5, fill: "var(--ink)" }));
    }
    const height = (strip * bin.pixels) / total;
    svg.append(make("rect", { x: x(bin.from), y: top + side + 22 + strip - height, width, height,
      fill: "var(--soft)" }));
  }
  for (const percent of [0, 50, 100]) {
    svg.append(make("line", { x1: left, x2: left + side, y1: y(percent), y2: y(percent), stroke: "var(--line)" }));
    svg.append(make("text", { x: left - 6, y: y(percent) + 4, "text-anchor": "end" }, `${percent}`));
    svg.append(make("text", { x: x(percent / 100), y: top + side + 14, "text-anchor": "middle" }, `${percent}`));
  }
  svg.append(make("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(100), stroke: "var(--ink)",
    "stroke-dasharray": "4 4" }));
  svg.append(make("text", { x: left + side / 2, y: 342, "text-anchor": "middle" }, "confidence in %, and its pixels"));
  svg.append(make("text", { x: -(top + side / 2), y: 11, transform: "rotate(-90)", "text-anchor": "middle" },
    "correct in %"));
  return make("figure", {}, make("figcaption", {},
    make("b", {}, chip(colourOf(k)), model.name), make("span", {}, `ECE ${number(ece)}`)), svg);
}

function settingsTable() {
  const lines = data.models.map((model, k) => make("tr", {}, make("td", {}, rows[k].name),
    make("td", { class: "text" }, model.paths.join(", ")),
    make("td", { class: "text" }, `${rows[k].split}, protocol ${model.protocol}`),
    make("td", { class: "text" }, Object.entries(model.settings).filter(([, value]) => value !== null && value.length !== 0)
      .map(([key, value]) => `${key} ${value}`).join(", "))));
  const heads = ["model", "path", "split", "settings"].map((name) => make("th", { class: "text" }, name));
  const versions = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  byId("settings").append(make("table", {}, make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...lines)), make("p", { class: "hint" }, versions));
}

function changeTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

document.title = data.title;
byId("title").textContent = data.title;
byId("subtitle").textContent = data.groups.map((group) => group.name).join("; ") +
  `; protocol ${[...new Set(rows.map((row) => row.protocol))].join(", ")}`;
byId("theme").addEventListener("click", changeTheme);
scoreTable();
classTable();
conditionTables();
byId("confusion-model").append(...rows.map((row, k) => make("option", { value: k }, row.name)));
byId("confusion-model").addEventListener("change", (event) => confusionTable(Number(event.target.value)));
confusionTable(0);
byId("reliability").append(...data.models.map(reliability));
settingsTable();
