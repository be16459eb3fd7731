"""Where networks and flows become a density of waveforms, and the files that hold one."""
