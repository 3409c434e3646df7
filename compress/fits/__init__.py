"""The best model within a bound on bytes, over families of compression.

bound ▶ families and what each can give up, from headers ▶ what each amount costs, measured by trials ▶ combinations ranked by
the sum of these costs ▶ finalists, tried whole ▶ the recipe of the best ▶ a run, judged by gates

A family whose smallest amount costs more than codes alone within the bound is left out after one trial. Trials are
processes of their own; what they measured is kept beside the output, where a search that was stopped goes on.
"""
