"use strict";
// The values under the pointer, or under the cursor that the arrow keys move. The charts themselves need no script.
const charts = JSON.parse(document.getElementById("data").textContent);
const hover = document.getElementById("hover");

// The place in a rising list that is nearest to a value.
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= value) low = middle; else high = middle;
  }
  return Math.abs(list[high] - value) < Math.abs(list[low] - value) ? high : low;
}

function attach(svg, chart) {
  const [left, unit, first] = chart.x;
  const cursor = svg.querySelector(".cursor");
  const steps = chart.lines.reduce((longest, line) => line.steps.length > longest.length ? line.steps : longest, []);
  let at = -1;

  function show(place) {
    at = Math.max(0, Math.min(steps.length - 1, place));
    const step = steps[at], x = left + (step - first) * unit;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const lines = chart.lines.map(line => {
      const near = nearest(line.steps, step);
      const where = line.steps[near] === step ? "" : " (step " + line.steps[near].toLocaleString("en") + ")";
      return line.name + ": " + line.values[near].toLocaleString("en", {maximumSignificantDigits: 5}) + where;
    });
    hover.textContent = ["step " + step.toLocaleString("en")].concat(lines).join("\n");
    hover.hidden = false;
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const across = box.left + x / view.width * box.width;
    const room = document.documentElement.clientWidth - hover.offsetWidth - 12;
    hover.style.left = Math.max(4, Math.min(room, across + 12)) + window.scrollX + "px";
    hover.style.top = box.top + window.scrollY + 8 + "px";
  }

  function hide() {
    cursor.setAttribute("visibility", "hidden");
    hover.hidden = true;
  }

  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(nearest(steps, first + (x - left) / unit));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1};
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

[...document.querySelectorAll("figure svg")].filter(svg => svg.querySelector(".cursor")).forEach((svg, n) => attach(svg, charts[n]));
