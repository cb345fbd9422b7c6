"""Looking a data set over: what is there, what is broken, what is there twice, and what texts look like."""
