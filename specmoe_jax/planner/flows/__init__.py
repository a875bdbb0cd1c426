"""The flows of experts as the planner knows them: checks, memory, costs. One module a flow; engine/flows runs them."""
