module yardsticks

go 1.25
