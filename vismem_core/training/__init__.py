"""Training memory: Stage I teaches what it holds, Stage II when to ask for it (Sec. 3.4)."""
