-- Sends the requests of a file (separated by NUL) in turn, @KEY@ replaced by a number of 16 digits that is new each
-- time, and prints what came of it as one line of JSON.
local heads, tails, n, sent = {}, {}, 0, 0

function init(args)
  local file = assert(io.open(args[1], "rb"))
  for one in file:read("*a"):gmatch("[^%z]+") do
    local first, last = one:find("@KEY@", 1, true)
    n = n + 1
    heads[n] = first and one:sub(1, first - 1) or one
    tails[n] = first and one:sub(last + 1)
  end
  file:close()
end

function request()
  local place = sent % n + 1
  sent = sent + 1
  if tails[place] then
    return heads[place] .. string.format("%016d", sent) .. tails[place]
  end
  return heads[place]
end

function done(summary, latency)
  local wrong = summary.errors
  io.write(string.format(
    '{"requests":%d,"seconds":%.6f,"p50_ms":%.4f,"p99_ms":%.4f,"bad_status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    wrong.status, wrong.connect, wrong.read, wrong.write, wrong.timeout))
end
