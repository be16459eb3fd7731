// The players of the report: all systems of a clip run on one clock, and one of them is heard.
(() => {
  "use strict";
  const FADE = 0.004; // seconds, so that a switch does not click
  const STEP = 0.25; // seconds, of an arrow key
  let context = null; // of the sound card; made when something is first played, as browsers ask
  let last = null; // the player that keys reach from anywhere on the page

  const decoded = (audio, rate) => {
    const bytes = Uint8Array.from(atob(audio.getAttribute("src").split(",")[1]), (c) => c.charCodeAt(0));
    return new OfflineAudioContext(1, 1, Math.min(96000, Math.max(8000, rate))).decodeAudioData(bytes.buffer);
  };

  class Player {
    constructor(root) {
      this.root = root;
      this.seconds = Number(root.dataset.seconds);
      const parts = [".play", ".seek", ".clock", ".loop"].map((selector) => root.querySelector(selector));
      [this.play_button, this.seeker, this.clock, this.looper] = parts;
      this.versions = [...root.querySelectorAll(".version")];
      this.lanes = [...root.querySelectorAll(".lane")].map((lane) => {
        const images = lane.querySelectorAll("img");
        const tracks = [...lane.querySelectorAll("audio")].map((audio, i) => ({ audio, image: images[i] }));
        return { button: lane.querySelector(".system"), picture: lane.querySelector(".picture"), tracks };
      });
      this.tracks = this.lanes.flatMap((lane) => lane.tracks);
      this.at = 0; // seconds; where it stands while it does not play
      this.version = 0;
      this.looping = false;
      this.lane = this.lanes.find((lane) => lane.button.getAttribute("aria-pressed") === "true");
      this.listen();
      this.show();
    }

    async load() {
      try {
        for (const track of this.tracks) track.buffer = await decoded(track.audio, Number(this.root.dataset.rate));
        this.root.dataset.ready = "";
        this.play_button.disabled = false;
      } catch (error) {
        console.warn(error);
        this.root.classList.add("plain"); // the browser's own players instead
      }
    }

    shown(lane) {
      return lane.tracks[Math.min(this.version, lane.tracks.length - 1)];
    }

    get playing() {
      return "playing" in this.root.dataset;
    }

    get position() {
      return this.playing ? Math.min(context.currentTime - this.began, this.seconds) : this.at;
    }

    take() {
      if (last !== this) last?.pause();
      last = this;
    }

    play() {
      if (!("ready" in this.root.dataset)) return;
      this.take();
      context ??= new AudioContext();
      context.resume();
      if (this.at > this.seconds - 0.02) this.at = 0;
      for (const track of this.tracks) {
        track.source = new AudioBufferSourceNode(context, { buffer: track.buffer });
        track.gain = new GainNode(context, { gain: track === this.shown(this.lane) ? 1 : 0 });
        track.source.connect(track.gain).connect(context.destination);
        track.source.start(0, this.at);
      }
      this.tracks[0].source.onended = () => this.end();
      this.began = context.currentTime - this.at;
      this.root.dataset.playing = "";
      this.show();
      this.run();
    }

    pause() {
      if (!this.playing) return;
      this.at = this.position;
      delete this.root.dataset.playing;
      this.tracks[0].source.onended = null;
      for (const track of this.tracks) track.source.stop();
      this.show();
    }

    end() {
      this.pause();
      this.at = 0;
      this.show();
      if (this.looping) this.play();
    }

    toggle() {
      return this.playing ? this.pause() : this.play();
    }

    seek(seconds) {
      const was = this.playing;
      this.pause();
      this.take();
      this.at = Math.min(Math.max(seconds, 0), this.seconds);
      if (was) this.play();
      else this.show();
    }

    choose(lane, version = this.version) {
      if (!lane) return;
      this.take();
      [this.lane, this.version] = [lane, version];
      for (const track of this.playing ? this.tracks : [])
        track.gain.gain.setTargetAtTime(track === this.shown(this.lane) ? 1 : 0, context.currentTime, FADE);
      this.show();
    }

    run() {
      this.draw();
      if (this.playing) requestAnimationFrame(() => this.run());
    }

    draw() {
      const at = this.position;
      this.root.style.setProperty("--at", at / this.seconds);
      this.clock.firstChild.textContent = at.toFixed(1);
      this.seeker.value = at;
      this.seeker.setAttribute("aria-valuetext", `${at.toFixed(1)} of ${this.seconds.toFixed(1)} seconds`);
    }

    show() {
      for (const lane of this.lanes) {
        lane.button.setAttribute("aria-pressed", lane === this.lane);
        for (const track of lane.tracks) track.image.hidden = track !== this.shown(lane);
      }
      this.versions.forEach((button, i) => button.setAttribute("aria-pressed", i === this.version));
      this.play_button.setAttribute("aria-label", `${this.playing ? "Pause" : "Play"}: ${this.lane.button.dataset.name}`);
      this.draw();
    }

    listen() {
      this.play_button.addEventListener("click", () => this.toggle());
      this.looper.addEventListener("click", () => this.loop());
      this.seeker.addEventListener("input", () => this.seek(Number(this.seeker.value)));
      this.versions.forEach((button, i) => button.addEventListener("click", () => this.choose(this.lane, i)));
      for (const lane of this.lanes) {
        lane.button.addEventListener("click", () => {
          if (lane === this.lane) return this.toggle();
          this.choose(lane);
          if (!this.playing) this.play();
        });
        const scrub = (event) => {
          const { left, width } = lane.picture.getBoundingClientRect();
          this.seek(((event.clientX - left) / width) * this.seconds);
        };
        lane.picture.addEventListener("click", (event) => {
          this.choose(lane);
          scrub(event);
        });
        lane.picture.addEventListener("pointerdown", (event) => lane.picture.setPointerCapture(event.pointerId));
        lane.picture.addEventListener("pointermove", (event) => {
          if (lane.picture.hasPointerCapture(event.pointerId)) scrub(event);
        });
      }
    }

    loop() {
      this.looping = !this.looping;
      this.looper.setAttribute("aria-pressed", this.looping);
    }

    key(key) {
      const next = (step) => this.lanes[this.lanes.indexOf(this.lane) + step];
      if (key === " ") this.toggle();
      else if (key === "ArrowLeft") this.seek(this.position - STEP);
      else if (key === "ArrowRight") this.seek(this.position + STEP);
      else if (key === "ArrowUp") this.choose(next(-1));
      else if (key === "ArrowDown") this.choose(next(1));
      else if (key === "d" && this.versions.length) this.choose(this.lane, 1 - this.version);
      else if (key === "l") this.loop();
      else if (key >= "1" && key <= "9") this.choose(this.lanes[key - 1]);
      else return false;
      return true;
    }
  }

  const players = new Map([...document.querySelectorAll(".clip")].map((root) => [root, new Player(root)]));
  document.documentElement.classList.add("scripted");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const own = players.get(event.target.closest(".clip"));
    if (event.key === " " && event.target.matches("button, summary, a")) return; // which a space presses
    // Away from the players, up and down scroll the page.
    const player = own ?? (event.key.match(/^Arrow(Up|Down)$/) ? null : event.target === document.body && last);
    if (player && player.key(event.key)) event.preventDefault();
  });
  for (const player of players.values()) player.load();
})();
