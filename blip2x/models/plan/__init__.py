"""What a training would take on other machines, by arithmetic: time, memory and what ranks send each other.

`assumptions` has the numbers that are not worked out, `parameters` what a model has, `traffic` what goes between ranks,
`estimate` time and memory of a step, `choose` the layouts and which one to take, `page` the tables of docs/scaling.md.
No paddle is needed.
"""
