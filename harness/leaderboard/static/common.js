// What both kinds of pages share: sorting tables, and the age of the data.
"use strict";

function cellValue(row, index) {
  const cell = row.cells[index];
  if (!cell) return "";
  const value = cell.dataset.value ?? cell.textContent.trim();
  return value !== "" && !Number.isNaN(Number(value)) ? Number(value) : value;
}

// Rows without a value stay last, whichever way the others are sorted.
function compareCells(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortTable(table, index, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [cellValue(row, index), row]);
  const empty = (value) => value === "" || value === "–";
  rows.sort(([a], [b]) =>
    empty(a) || empty(b) ? empty(a) - empty(b) : direction * compareCells(a, b));
  body.append(...rows.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === index) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    cell.replaceChildren(button);
    button.addEventListener("click", () => {
      const sorted = cell.getAttribute("aria-sort");
      const first = cell.classList.contains("number") ? -1 : 1;
      const direction = sorted === null ? first : sorted === "ascending" ? -1 : 1;
      sortTable(table, index, direction);
    });
  });
}

function showAge() {
  const time = document.querySelector("footer time");
  if (!time) return;
  const days = Math.floor((Date.now() - new Date(time.dateTime)) / 86400000);
  time.after(days <= 0 ? " (today)" : days === 1 ? " (a day ago)" : ` (${days} days ago)`);
}

showAge();
