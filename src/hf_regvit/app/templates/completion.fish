# Completion of regvit for fish, written by `regvit completion fish`.
function __regvit_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l command $words[2]
    set -l option ''
    set -l before ''
    set -l index (count $words)
    set -l distance
    set -l daily
    set -l others
    set -l values
    if test $index -eq 1
        printf '%s\n' @commands@
        return
    end
    switch $command
@options@
    end
    if string match -q -- '--*=*' $word
        set before (string replace -r '=.*' = -- $word)
        set option (string replace -r '=.*' '' -- $word)
        set word (string replace -r '^[^=]*=' '' -- $word)
        set distance 1
    else
        while test $index -gt 2; and not string match -q -- '--*' $words[$index]
            set index (math $index - 1)
        end
        set distance (math (count $words) + 1 - $index)
        if test $index -gt 2
            set option (string replace -r '=.*' '' -- $words[$index])
            string match -q -- '--*=*' $words[$index]; and set distance (math $distance + 1)
        end
    end
    set option (string replace -- -- '' $option | string replace -a -- - _)
    switch "$command:$option:$distance"
@values@
    end
    if string match -q -- '-*' $word; or test (count $values) -eq 0
        set values @options
    end
    switch $values[1]
        case @files
            for path in (__fish_complete_path $word)
                echo $before$path
            end
        case @none
        case @options
            test (string length -- $word) -gt 2; and set -a daily $others
            printf '%s\n' $daily
        case '*'
            printf '%s\n' $before$values
    end
end
complete -c regvit -f -a '(__regvit_complete)'
