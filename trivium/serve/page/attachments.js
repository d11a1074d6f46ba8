// Pictures and sounds that go with a prompt: dropped, pasted, chosen or recorded, and shown where they were sent.

import { $, make } from "./elements.js";

const LARGEST_SIDE = 1024;   // A picture is made smaller here: what a model sees of it is smaller still.
const RATE = 16000;          // Samples of a second that a model hears.
const LONGEST = 30;          // Seconds of a recording.
let pending = [];
let tell = () => {};

export function takeAttached() {
  const taken = pending;
  pending = [];
  show();
  return taken;
}
export function attach(parts) {
  pending = [...parts];
  show();
}

// What stands in a message: OpenAI's parts.
export const contentOf = (parts, words) => (parts.length ? [...parts.map((one) => one.part), { type: "text", text: words }] : words);

export function preview(one) {
  if (one.part.type === "image_url") {
    const picture = make("img", "attached");
    picture.src = one.part.image_url.url;
    picture.alt = one.name;
    return picture;
  }
  const sound = make("audio", "attached");
  sound.controls = true;
  sound.src = `data:audio/wav;base64,${one.part.input_audio.data}`;
  sound.setAttribute("aria-label", one.name);
  return sound;
}
function show() {
  $("attached").replaceChildren(...pending.map((one) => {
    const item = make("li");
    const remove = make("button", "quiet", "Remove");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${one.name}`);
    remove.addEventListener("click", () => { pending = pending.filter((other) => other !== one); show(); $("prompt").focus(); });
    item.append(preview(one), remove);
    return item;
  }));
  $("attached").hidden = pending.length === 0;
}

const asBase64 = (bytes) => {
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  return btoa(text);
};
async function pictureOf(file) {
  const drawn = await createImageBitmap(file);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(drawn.width, drawn.height));
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(drawn.width * scale));
  canvas.height = Math.max(1, Math.round(drawn.height * scale));
  canvas.getContext("2d").drawImage(drawn, 0, 0, canvas.width, canvas.height);
  const whole = canvas.toDataURL("image/png");
  // A photograph as PNG may be more than a server reads at once.
  const url = whole.length < 700000 ? whole : canvas.toDataURL("image/jpeg", 0.9);
  return { name: file.name || "picture", part: { type: "image_url", image_url: { url } } };
}
async function soundOf(file) {
  const context = new OfflineAudioContext(1, RATE, RATE);
  const heard = await context.decodeAudioData(await file.arrayBuffer());
  const samples = new Float32Array(Math.min(heard.length, LONGEST * RATE));
  for (let channel = 0; channel < heard.numberOfChannels; channel += 1) {
    const from = heard.getChannelData(channel);
    for (let place = 0; place < samples.length; place += 1) samples[place] += from[place] / heard.numberOfChannels;
  }
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const letters = (place, text) => [...text].forEach((letter, index) => view.setUint8(place + index, letter.charCodeAt(0)));
  letters(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  letters(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, index) => view.setInt16(44 + 2 * index, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return { name: file.name || "sound", part: { type: "input_audio", input_audio: { data: asBase64(new Uint8Array(view.buffer)), format: "wav" } } };
}
async function add(files) {
  for (const file of files) {
    try {
      pending.push(file.type.startsWith("audio/") ? await soundOf(file) : await pictureOf(file));
    } catch {
      tell(`${file.name || "This"} is neither a picture nor a sound that can be read here.`);
    }
  }
  show();
  $("prompt").focus();
}

let recorder = null;
async function record() {
  if (recorder) { recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    tell("The browser gives this page no microphone.");
    return;
  }
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.addEventListener("stop", () => {
    stream.getTracks().forEach((track) => track.stop());
    recorder = null;
    $("record").textContent = "Record";
    add([new File(pieces, "recording", { type: "audio/webm" })]);
  });
  recorder.start();
  $("record").textContent = "Stop recording";
  setTimeout(() => recorder?.stop(), LONGEST * 1000);
}

// Which of the two some chosen model takes.
export function offer(pictures, sounds) {
  $("choose-file").hidden = !pictures && !sounds;
  $("record").hidden = !sounds || !navigator.mediaDevices;
}
export function wireAttachments(say) {
  tell = say;
  const filesIn = (data) => [...(data?.files || [])].filter((file) => /^(image|audio)\//.test(file.type));
  $("choose-file").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => { add([...$("file").files]); $("file").value = ""; });
  $("record").addEventListener("click", record);
  $("prompt").addEventListener("paste", (event) => {
    const files = filesIn(event.clipboardData);
    if (files.length) { event.preventDefault(); add(files); }
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    add(filesIn(event.dataTransfer));
  });
}
