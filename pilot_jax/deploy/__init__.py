"""A federation on a real network, by Flower: `glue` is all that happens in a phase, `server` and `client` are Flower's
two kinds of app around it. Transport, scheduling and authentication are Flower's, the method is `federation`'s."""
