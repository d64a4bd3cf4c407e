"""One file per verb: HELP, add(parser), run(args), text(document). Importing them never imports torch."""
