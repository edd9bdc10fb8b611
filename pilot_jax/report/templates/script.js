"use strict";
const tip = document.getElementById("tip"), said = document.getElementById("said");
const visible = element => element.getClientRects().length > 0;

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
}

/* The matrix of a plot with a slider: its phases' weights, which phase is shown, and the cell under a pointer. */
function matrixOf(card) {
  const source = card.querySelector("script[type='application/json']");
  if (!source) return null;
  const data = JSON.parse(source.textContent), ink = data.ink;
  const decoded = new Map();
  const weights = number => {
    if (!decoded.has(number)) {
      const bytes = atob(data.phases[number].weights), values = new Float64Array(bytes.length / 2);
      for (let i = 0; i < values.length; i++)
        values[i] = (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) / 65535;
      decoded.set(number, values);
    }
    return decoded.get(number);
  };
  const matrix = {
    phase: data.phases.length - 1, row: 0, column: 0,
    get clients() { return data.phases[matrix.phase].clients; },
    text(row, column) {
      const names = matrix.clients, count = names.length, own = weights(matrix.phase), value = own[row * count + column];
      if (!own.subarray(row * count, (row + 1) * count).some(Boolean)) return `${names[row]} took no part in this phase`;
      return `${names[row]} receives ${value.toFixed(value && value < .01 ? 4 : 2)} of ` +
        (row === column ? "its own upload" : `the upload of ${names[column]}`);
    },
    draw() {
      const count = matrix.clients.length, values = weights(matrix.phase);
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = count;
      const context = canvas.getContext("2d"), pixels = context.createImageData(count, count);
      values.forEach((value, i) => pixels.data.set([...ink, Math.round(255 * Math.sqrt(value))], 4 * i));
      context.putImageData(pixels, 0, 0);
      for (const image of card.querySelectorAll("image.cells")) image.setAttribute("href", canvas.toDataURL());
      for (const cell of card.querySelectorAll("[data-cell]")) {
        const [i, j] = cell.dataset.cell.split(",").map(Number), value = values[i * count + j];
        cell.textContent = value < .005 ? "" : value.toFixed(2).replace(/^0/, "");
        cell.setAttribute("class", Math.sqrt(value) < .6 ? "onlight" : "ondark");
      }
    },
  };
  return matrix;
}

for (const card of document.querySelectorAll(".card")) {
  const plot = card.querySelector(".plot");
  if (!plot) continue;
  const matrix = matrixOf(card);
  let at = null;
  const marks = () => [...plot.querySelectorAll("[data-tip]")].filter(visible);
  const leave = () => {
    tip.hidden = true;
    if (at) at.classList.remove("at");
    at = null;
  };
  const enter = (mark, x, y) => {
    if (at !== mark) leave();
    at = mark;
    mark.classList.add("at");
    show(mark.dataset.tip, x, y);
  };
  const centre = element => {
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const image = () => [...plot.querySelectorAll("image.cells")].find(visible);
  plot.addEventListener("pointermove", event => {
    if (matrix) {
      const box = image().getBoundingClientRect(), count = matrix.clients.length;
      const column = Math.floor((event.clientX - box.x) / box.width * count);
      const row = Math.floor((event.clientY - box.y) / box.height * count);
      if (row < 0 || column < 0 || row >= count || column >= count) return leave();
      return show(matrix.text(row, column), event.clientX, event.clientY);
    }
    let best = null, least = 22;
    for (const mark of marks()) {
      const box = mark.getBoundingClientRect();
      const dx = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const dy = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      const [x, y] = centre(mark), away = Math.hypot(dx, dy) + .01 * Math.hypot(x - event.clientX, y - event.clientY);
      if (away < least) [best, least] = [mark, away];
    }
    if (best) enter(best, event.clientX, event.clientY); else leave();
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (event.key === "Escape") return leave();
    if (!step) return;
    event.preventDefault();
    if (matrix) {
      const count = matrix.clients.length, axis = event.key.endsWith("t") ? "column" : "row";
      matrix[axis] = Math.max(0, Math.min(count - 1, matrix[axis] + step));
      const box = image().getBoundingClientRect();
      show(matrix.text(matrix.row, matrix.column), box.x + (matrix.column + .5) * box.width / count,
        box.y + (matrix.row + .5) * box.height / count);
    } else {
      const all = marks();
      if (!all.length) return;
      const next = at ? (all.indexOf(at) + step + all.length) % all.length : step > 0 ? 0 : all.length - 1;
      enter(all[next], ...centre(all[next]));
    }
    said.textContent = tip.textContent;
  });
  for (const button of card.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      for (const mark of plot.querySelectorAll("[data-series]"))
        if (mark.dataset.series === button.dataset.hides) mark.classList.toggle("off", !shown);
      leave();
    });
  if (!matrix) continue;
  const slider = card.querySelector(".slider input"), label = card.querySelector(".phase");
  const rows = card.querySelectorAll("tr[data-group]");
  const only = number => { for (const row of rows) row.hidden = row.dataset.group !== String(number); };
  only(matrix.phase);
  if (slider) slider.addEventListener("input", () => {
    matrix.phase = Number(slider.value);
    const count = matrix.clients.length;
    matrix.row = Math.min(matrix.row, count - 1);
    matrix.column = Math.min(matrix.column, count - 1);
    label.textContent = JSON.parse(label.dataset.phases)[matrix.phase];
    slider.setAttribute("aria-valuetext", label.textContent);
    matrix.draw();
    only(matrix.phase);
  });
}

for (const part of document.querySelectorAll(".answers")) {
  const selects = [...part.querySelectorAll("select")], count = part.querySelector(".count");
  const filter = () => {
    let shown = 0;
    for (const side of part.querySelectorAll(".side")) {
      let here = 0;
      for (const example of side.querySelectorAll(".example")) {
        const fits = selects.every(select => !select.value || example.dataset[select.dataset.filter] === select.value);
        example.classList.toggle("filtered", !fits);
        here += fits;
      }
      side.querySelector(".none").hidden = here > 0;
      shown += here;
    }
    count.textContent = shown === 1 ? "1 answer" : `${shown} answers`;
  };
  for (const select of selects) select.addEventListener("change", filter);
  filter();
}
