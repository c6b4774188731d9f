"use strict";
if (navigator.language.toLowerCase().startsWith("zh")) document.getElementById("lang-zh").checked = true;
