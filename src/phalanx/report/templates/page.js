"use strict";
// Sorting: a table's groups of lines are put in order by the cell of their first line; equal ones stay as they are.
const value = (group, column) => group.rows[0].cells[column].textContent.trim();
const number = (text) => (/^-?[\d,.]+/.test(text) ? parseFloat(text.replaceAll(",", "")) : null);
const order = new Intl.Collator("en", { numeric: true }).compare;
function compare(first, second) {
  const [a, b] = [number(first), number(second)];
  if (a !== null && b !== null) return a - b;
  return a === null && b === null ? order(first, second) : 0;
}
// what was not measured comes last, whichever way the table is sorted
const absent = (text) => text === "" || text === "–";
function sort(table, column, falling) {
  const groups = [...table.tBodies].map((body, place) => ({ body, place, text: value(body, column) }));
  groups.sort((a, b) => absent(a.text) - absent(b.text) || (falling ? -1 : 1) * compare(a.text, b.text) || a.place - b.place);
  table.append(...groups.map((group) => group.body));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = number(value(table.tBodies[0], column)) !== null || head.classList.contains("number");
      const falling = head.ariaSort ? head.ariaSort === "ascending" : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      sort(table, column, falling);
    });
  });
}
// what is folded away on the screen is on paper, but for the numbers of the drawings
addEventListener("beforeprint", () => document.querySelectorAll("details.fold").forEach((found) => (found.open = true)));
// a link into something folded opens it
function reveal() {
  const found = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
  found?.closest("details")?.setAttribute("open", "");
}
addEventListener("hashchange", reveal);
reveal();
