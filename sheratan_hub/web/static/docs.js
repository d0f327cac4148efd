"use strict";
for (const place of document.querySelectorAll(".origin")) place.textContent = location.origin;
for (const button of document.querySelectorAll(".ask button")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
document.getElementById("filter").addEventListener("input", (event) => {
  const word = event.target.value.toLowerCase();
  for (const section of document.querySelectorAll("main section")) {
    let some = false;
    for (const route of section.querySelectorAll(":scope > details")) {
      route.hidden = !route.firstChild.textContent.toLowerCase().includes(word);
      some = some || !route.hidden;
    }
    section.hidden = !some;
  }
});
document.getElementById("theme").addEventListener("change", (event) => {
  document.documentElement.dataset.theme = event.target.value;
});
const named = document.getElementById(location.hash.slice(1));
if (named) named.open = true;
