"use strict";
if (navigator.language.toLowerCase().startsWith("zh")) document.getElementById("lang-zh").checked = true;

// What is folded is printed too.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const folded of opened) folded.open = true;
});
addEventListener("afterprint", () => {
  for (const folded of opened) folded.open = false;
});
