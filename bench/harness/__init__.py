"""What measures: cases, contests, clocks, records, and what a run is made of."""
