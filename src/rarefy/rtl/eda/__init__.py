"""The open tools around a design: found, run, and asked what it costs in standard cells and on an FPGA."""
